// A small map: the path of the camera, seen from above, with where it is and looks now.

import { crisp } from "./charts.js";

const KEPT = 4000; // points of the path
const LEAST = 3; // steps that the map shows to each side, at least
const JUMP = 4; // steps from one frame to the next that are no walking

export class Map {
  constructor(canvas, words) {
    Object.assign(this, { canvas, words, step: 1 });
    this.path = [];
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  /** Latent frames in turn: [x, y, z, yaw, pitch], x to the right and z ahead of where the video began, in degrees. */
  add(frames) {
    if (!frames.length) return;
    this.path = [...this.path, ...frames].slice(-KEPT);
    this.draw();
    const [x, , z, yaw] = this.path.at(-1);
    const far = (value, one, other) => `${(Math.abs(value) / this.step).toFixed(1)} ${value < 0 ? other : one}`;
    const turned = `${Math.abs(Math.round(yaw))}\u00b0 to the ${yaw < 0 ? "left" : "right"}`;
    this.words.textContent = `${far(z, "steps ahead", "steps back")}, ${far(x, "to the right", "to the left")}, looking ${turned}.`;
    Object.assign(this.canvas.dataset, { x, z, yaw });
  }

  clear() {
    this.path = [];
    this.words.textContent = "Where the camera is will be shown here.";
    this.draw();
  }

  draw() {
    const { canvas, path, step } = this;
    const paper = crisp(canvas);
    if (!paper) return;
    const { brush, wide, high, color } = paper;
    const xs = [0, ...path.map((point) => point[0])];
    const zs = [0, ...path.map((point) => point[2])];
    const middle = (all) => (Math.min(...all) + Math.max(...all)) / 2;
    const reach = (all) => (Math.max(...all) - Math.min(...all)) / 2;
    const scale = (Math.min(wide, high) / 2 - 12) / Math.max(LEAST * step, reach(xs), reach(zs));
    const place = (x, z) => [wide / 2 + (x - middle(xs)) * scale, high / 2 - (z - middle(zs)) * scale];

    brush.strokeStyle = color("--edge");
    brush.beginPath();
    const [startX, startY] = place(0, 0);
    brush.arc(startX, startY, 4, 0, 2 * Math.PI);
    brush.stroke();
    if (!path.length) return;
    brush.strokeStyle = color("--main");
    brush.lineWidth = 2;
    brush.beginPath();
    path.forEach(([x, , z], index) => {
      const before = path[index - 1];
      const isJump = !before || Math.hypot(x - before[0], z - before[2]) > JUMP * step;
      brush[isJump ? "moveTo" : "lineTo"](...place(x, z));
    });
    brush.stroke();
    const [x, , z, yaw] = path.at(-1);
    const [left, top] = place(x, z);
    brush.translate(left, top);
    brush.rotate((yaw * Math.PI) / 180);
    brush.fillStyle = color("--mark");
    brush.beginPath();
    brush.moveTo(0, -10);
    brush.lineTo(6, 6);
    brush.lineTo(0, 3);
    brush.lineTo(-6, 6);
    brush.closePath();
    brush.fill();
  }
}
