// One session in place of the one that plays, which goes on where there is none.

import { stored, tell } from "./page.js";

/** now: the page's api and stream; end() ends the session that plays, begin(open) joins the one that `open` gives, fresh()
 *  opens a new one. -> replace(open), which gives the session that was joined, or null. */
export function replacing(now, { end, begin, fresh }) {
  const isPlaying = () => Boolean(now.stream && !now.stream.isOver);
  let isBusy = false;

  /** The session that `open` gives, when the one that plays is ended: before it only where there is no place for both. */
  async function instead(open) {
    tell("");
    let opened = null;
    try {
      opened = await open();
    } catch (problem) {
      const isFull = problem.code === "busy" && (await now.api.ready().catch(() => ({}))).free_sessions === 0;
      if (!isFull) {
        tell(problem.message);
        return null;
      }
    }
    await end();
    return opened;
  }

  return async function replace(open = fresh) {
    if (isBusy) return null;
    let opened = null;
    try {
      isBusy = true;
      if (isPlaying()) {
        opened = await instead(open);
        if (!opened && isPlaying()) return null;
      }
      stored(() => sessionStorage, "session", null);
      return await begin(opened ? async () => opened : open);
    } finally {
      isBusy = false;
    }
  };
}
