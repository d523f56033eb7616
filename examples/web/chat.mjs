// The chat template of an artifact, which chat.json has as pieces of text.

const SPACE = "[\\t-\\r\\x1c- \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+"; // Python's
const AROUND = new RegExp(`^${SPACE}|${SPACE}$`, "g");

export class Chat {
  /** @param pieces The artifact's chat.json, parsed, if it has one. */
  constructor(pieces) {
    if (!pieces?.first)
      throw new Error("there is no chat.json: the model has no chat template, or one that only the package can render");
    this.pieces = pieces;
    this.ends = pieces.ends;
  }

  /** Return the text of a question that begins a conversation, after a system message if there is one. */
  first(question, system) {
    const pieces = system ? this.pieces.system : this.pieces.first;
    if (!pieces) throw new Error("chat.json has no pieces for a system message");
    return pieces[0] + (system ? this.#said(system) + pieces[1] : "") + this.#said(question) + pieces.at(-1);
  }

  /** Return the text between the model's last answer and its next one. */
  next(question) {
    const [before, after] = this.pieces.next;
    return before + this.#said(question) + after;
  }

  #said(text) {
    const token = this.pieces.special.find((token) => text.includes(token));
    if (token) throw new Error(`a message has ${token}, which this program cannot send as text`);
    const trimmed = text.replace(AROUND, "");
    if (!trimmed) throw new Error("a message is empty");
    return this.pieces.trims ? trimmed : text;
  }
}
