// What the page draws beside the video: two graphs against the real-time line, and the strip of thumbnails.

const KEPT = 120;
const THUMBNAILS = 60;

/** A canvas emptied, with a brush for its size on the page, and colours by their names there; null while it is hidden. */
export function crisp(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const [wide, high] = [canvas.clientWidth, canvas.clientHeight];
  if (!wide || !high) return null;
  Object.assign(canvas, { width: Math.round(wide * ratio), height: Math.round(high * ratio) });
  const brush = canvas.getContext("2d");
  brush.scale(ratio, ratio);
  const style = getComputedStyle(canvas);
  return { brush, wide, high, color: (name) => style.getPropertyValue(name) };
}

/** A short history of numbers, as bars or as a curve, with a line to compare them with. */
export class Graph {
  constructor(canvas, { bars, digits, isWorse }) {
    Object.assign(this, { canvas, bars, digits, isWorse });
    this.values = [];
    this.line = 0;
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  add(value, line) {
    this.values.push(value);
    if (this.values.length > KEPT) this.values.shift();
    this.line = line;
    this.draw();
  }

  clear() {
    this.values.length = 0;
    this.draw();
  }

  draw() {
    const { canvas, values, line } = this;
    const paper = crisp(canvas);
    if (!paper) return;
    const { brush, wide, high, color } = paper;
    const top = 1.25 * Math.max(line, ...values, 1e-6);
    const y = (value) => high - (value / top) * (high - 14);
    const step = wide / KEPT;
    brush.lineWidth = 2;
    brush.strokeStyle = color("--good");
    brush.beginPath();
    values.forEach((value, i) => {
      const x = (KEPT - values.length + i) * step;
      if (this.bars) {
        brush.fillStyle = color(this.isWorse(value, line) ? "--bad" : "--good");
        brush.fillRect(x, y(value), Math.max(1, step - 1), high - y(value));
      } else {
        brush.lineTo(x, y(value));
      }
    });
    if (!this.bars) brush.stroke();
    if (!line) return;
    brush.strokeStyle = color("--mark");
    brush.setLineDash([6, 4]);
    brush.beginPath();
    brush.moveTo(0, y(line));
    brush.lineTo(wide, y(line));
    brush.stroke();
    brush.fillStyle = color("--mark");
    brush.font = "12px system-ui, sans-serif";
    brush.fillText(line.toFixed(this.digits), 2, y(line) - 4);
  }
}

/** Thumbnails of what was shown, about one a second and one wherever the prompt changed. */
export class Timeline {
  constructor(list, empty, reuse) {
    Object.assign(this, { list, empty, reuse });
    this.clear();
  }

  clear() {
    this.list.replaceChildren();
    this.list.hidden = true;
    this.empty.hidden = false;
    this.prompt = null;
    this.at_s = -Infinity;
  }

  shown(canvas, { header, index }) {
    const now_s = (header.first_frame + index) / header.fps;
    const isChange = header.prompt !== this.prompt;
    if (!isChange && Math.abs(now_s - this.at_s) < 1) return;
    this.at_s = now_s;
    const item = document.createElement("li");
    const small = document.createElement("canvas");
    const scale = Math.min(1, 176 / canvas.width);
    Object.assign(small, { width: canvas.width * scale, height: canvas.height * scale });
    small.getContext("2d").drawImage(canvas, 0, 0, small.width, small.height);
    const time = clock(now_s);
    small.setAttribute("role", "img");
    small.setAttribute("aria-label", `Picture at ${time}`);
    item.append(small, time);
    if (isChange) item.append(this.mark(item, header.prompt, time));
    this.prompt = header.prompt;
    this.list.hidden = false;
    this.empty.hidden = true;
    const isAtEnd = this.list.scrollLeft + this.list.clientWidth > this.list.scrollWidth - 150;
    this.list.append(item);
    while (this.list.children.length > THUMBNAILS) this.list.firstElementChild.remove();
    if (isAtEnd) this.list.scrollLeft = this.list.scrollWidth;
  }

  mark(item, prompt, time) {
    item.className = "change";
    const button = document.createElement("button");
    button.type = "button";
    button.append(Object.assign(document.createElement("span"), { textContent: prompt })); // cut to two lines
    button.setAttribute("aria-label", `Prompt from ${time}: ${prompt}. Use it again`);
    button.onclick = () => this.reuse(prompt);
    return button;
  }
}

function clock(seconds) {
  const whole = Math.floor(seconds);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}
