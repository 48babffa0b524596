// The picture that a video starts from: read, made small before it travels, shown beside its button.

import { $, say, tell } from "./page.js";
import { Problem } from "./wire.js";

const MOST_BYTES = 64e6;

/** Shows what was given; `send(image)` gives it to the session: base64, or null for none. */
export class FirstPicture {
  constructor(video, send) {
    Object.assign(this, { video, send });
    $("image").addEventListener("change", () => {
      if ($("image").files[0]) this.give($("image").files[0]);
      $("image").value = "";
    });
    $("without").addEventListener("click", () => this.give(null));
  }

  async give(file) {
    tell("");
    try {
      const picture = file && (await shrunk(file, 2 * Math.max(this.video.width, this.video.height)));
      await this.send(picture && picture.toDataURL("image/png").split(",")[1]);
      if (picture) this.draw(picture);
      this.mark(Boolean(picture));
      say(picture ? "The video starts again from your picture." : "The video starts again without a picture.");
    } catch (problem) {
      tell(problem instanceof Problem ? problem.message : `${file.name} is not a picture that this browser can read.`);
    }
  }

  /** The middle of it, in the video's shape: what the server makes of it. */
  draw(picture) {
    const { width, height } = this.video;
    const small = $("thumbnail");
    Object.assign(small, { width: Math.round((64 * width) / height), height: 64 });
    const scale = Math.min(picture.width / width, picture.height / height);
    const [wide, high] = [width * scale, height * scale];
    const [left, top] = [(picture.width - wide) / 2, (picture.height - high) / 2];
    small.getContext("2d").drawImage(picture, left, top, wide, high, 0, 0, small.width, small.height);
    this.isDrawn = true;
  }

  /** Whether the session starts from a picture, as the server says; after a reload there is no picture to show. */
  mark(isGiven) {
    if (!isGiven) this.isDrawn = false;
    $("thumbnail").hidden = !this.isDrawn;
    $("without").hidden = !isGiven;
    $("picture-name").textContent = isGiven ? "This video starts from a picture" : "First picture";
  }

  /** false: this model takes none. */
  allow(isPossible) {
    $("image").disabled = !isPossible;
    $("picture-help").textContent = isPossible
      ? "PNG, JPEG or WebP, cut to the video's shape; or drop one on this page."
      : "Only frame-wise models (chunk 1) start from a picture; this one makes several frames together.";
  }
}

/** A picture file -> a canvas whose shorter side has at most so many pixels. */
async function shrunk(file, most) {
  if (file.size > MOST_BYTES) throw new Problem(`${file.name} has more than ${MOST_BYTES / 1e6} MB.`);
  const picture = await createImageBitmap(file);
  const scale = Math.min(1, most / Math.min(picture.width, picture.height));
  const small = document.createElement("canvas");
  small.width = Math.max(1, Math.round(picture.width * scale));
  small.height = Math.max(1, Math.round(picture.height * scale));
  small.getContext("2d").drawImage(picture, 0, 0, small.width, small.height);
  picture.close();
  return small;
}
