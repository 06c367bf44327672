// Which words of two texts differ: a longest common subsequence of their words. No DOM.

// A word, or one sign. Scripts that write without spaces are compared character by character.
const UNSPACED = "[\\p{Script=Han}\\p{Script=Hiragana}\\p{Script=Katakana}\\p{Script=Thai}]";
const LETTERS = `(?:(?!${UNSPACED})[\\p{L}\\p{N}\\p{M}_])+`;
const TOKEN = new RegExp(`\\s+|${UNSPACED}\\p{M}*|${LETTERS}(?:['\u2019]${LETTERS})*|[^]`, "gu");
const SPACE = /^\s/u;
const WORD = /[\p{L}\p{N}]/u;

/** Most pairs of words one comparison looks at; beyond, it would hold the page up. */
export const MOST_PAIRS = 25_000_000;

/** The words and signs of a text, each with the white space before it: [{ text, lead }], and the space at the end. */
export function tokenize(text) {
  const tokens = [];
  let lead = "";
  for (const part of text.match(TOKEN) ?? []) {
    if (SPACE.test(part)) lead += part;
    else {
      tokens.push({ text: part, lead });
      lead = "";
    }
  }
  return { tokens, tail: lead };
}

/**
 * Compare two texts: { left, right } as runs [{ text, differs }], `differ` and `words` counts of [left, right], and
 * `same` when not even a sign differs. null if they are too long.
 *
 * open: whether [left, right] is still being written. The last word of an open text may be half a word, and what the
 * other text has beyond it is not a difference yet.
 */
export function compare(leftText, rightText, open = [false, false], most = MOST_PAIRS) {
  const sides = [tokenize(leftText), tokenize(rightText)];
  const words = sides.map(({ tokens }) => tokens.map((token) => token.text));
  const common = align(words[0], words[1], most);
  if (common === null) return null;
  const marks = common.map((kept) => kept.map((keep) => !keep));
  for (const side of [0, 1].filter((side) => open[side])) {
    const reached = Math.max(words[side].length - 1, 0);
    marks[side].fill(false, reached);
    marks[1 - side].fill(false, reached);
  }
  const isWord = words.map((list) => list.map((word) => WORD.test(word)));
  return {
    left: runs(sides[0], marks[0]),
    right: runs(sides[1], marks[1]),
    words: isWord.map((list) => list.filter(Boolean).length),
    differ: isWord.map((list, side) => list.filter((word, i) => word && marks[side][i]).length),
    same: !marks[0].includes(true) && !marks[1].includes(true),
  };
}

/** For each word of a and of b, whether it belongs to a longest common subsequence; null beyond `most` pairs. */
export function align(a, b, most = MOST_PAIRS) {
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  let end = 0;
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const n = a.length - start - end;
  const m = b.length - start - end;
  if (n * m > most) return null;
  const keep = [a, b].map((words) => words.map((_, i) => i < start || i >= words.length - end));
  // lengths[i * (m + 1) + j]: of the longest common subsequence of a[start + i ...] and b[start + j ...]
  const width = m + 1;
  const lengths = new Uint16Array((n + 1) * width); // the shorter side has sqrt(MOST_PAIRS) words at most
  for (let i = n - 1; i >= 0; i--) {
    for (let j = m - 1; j >= 0; j--) {
      const at = i * width + j;
      lengths[at] = a[start + i] === b[start + j]
        ? lengths[at + width + 1] + 1
        : Math.max(lengths[at + width], lengths[at + 1]);
    }
  }
  for (let i = 0, j = 0; i < n && j < m; ) {
    const at = i * width + j;
    if (a[start + i] === b[start + j]) keep[0][start + i++] = keep[1][start + j++] = true;
    else if (lengths[at + width] >= lengths[at + 1]) i++;
    else j++;
  }
  return keep;
}

/** Neighbouring words with the same mark become one run; the space between two marked words is marked with them. */
function runs({ tokens, tail }, marks) {
  const out = [];
  const add = (text, differs) => {
    if (!text) return;
    if (out.length && out[out.length - 1].differs === differs) out[out.length - 1].text += text;
    else out.push({ text, differs });
  };
  tokens.forEach((token, i) => {
    add(token.lead, marks[i] && i > 0 && marks[i - 1]);
    add(token.text, marks[i]);
  });
  add(tail, false);
  return out;
}
