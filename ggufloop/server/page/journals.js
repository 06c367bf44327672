// The journal of `ggufloop sweep`, summed up: what each loop gains over plain on the items both were scored on.

const isSlice = (record) => typeof record?.measure === "string" && typeof record.loop === "string"
  && Array.isArray(record.items) && Array.isArray(record.scores) && record.items.length === record.scores.length;

const isSaid = (record) => typeof record?.said === "string" && Array.isArray(record.loops);

/** Split the records of a JSONL file: { slices, said, others }: scores of a sweep, its last verdict on each measure. */
export function splitJournal(records) {
  const said = new Map(records.filter(isSaid).map((record) => [record.said, record]));
  return {
    slices: records.filter(isSlice), said: [...said.values()],
    others: records.filter((record) => !isSlice(record) && !isSaid(record)),
  };
}

/**
 * Sum slices up: [{ measure, loop, n, score, gain, low, high, seconds }], in order of appearance. score: mean over
 * the loop's items, n of them; gain: of its paired differences to plain, low and high their 95 % interval by Student's
 * t; null where there is nothing to compare with, or one item.
 */
export function sumUp(slices) {
  const cells = new Map();
  for (const { measure, loop, items, scores, seconds } of slices) {
    const key = JSON.stringify([measure, loop]);
    if (!cells.has(key)) cells.set(key, { measure, loop, scores: new Map(), seconds: 0 });
    const cell = cells.get(key);
    items.forEach((item, i) => cell.scores.set(item, scores[i]));
    cell.seconds += seconds ?? 0;
  }
  return [...cells.values()].map(({ measure, loop, scores, seconds }) => {
    const plain = cells.get(JSON.stringify([measure, "plain"]))?.scores;
    const changes = loop === "plain" || !plain ? [] : [...scores].filter(([item]) => plain.has(item))
      .map(([item, score]) => score - plain.get(item));
    const gain = changes.length ? mean(changes) : null;
    const half = changes.length > 1 ? t95(changes.length - 1) * Math.sqrt(variance(changes) / changes.length) : null;
    return {
      measure, loop, n: scores.size, score: mean([...scores.values()]), gain,
      low: half === null ? null : gain - half, high: half === null ? null : gain + half, seconds,
    };
  });
}

/** The 97.5 % quantile of Student's t: exact up to 3 degrees of freedom, then Fisher's expansion (within 1e-3). */
export function t95(df) {
  if (df <= 3) return [12.7062, 4.30265, 3.18245][df - 1];
  const z = 1.959964;
  const terms = [
    z, (z ** 3 + z) / 4, (5 * z ** 5 + 16 * z ** 3 + 3 * z) / 96,
    (3 * z ** 7 + 19 * z ** 5 + 17 * z ** 3 - 15 * z) / 384,
    (79 * z ** 9 + 776 * z ** 7 + 1482 * z ** 5 - 1920 * z ** 3 - 945 * z) / 92160,
  ];
  return terms.reduce((sum, term, i) => sum + term / df ** i, 0);
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function variance(values) {
  const middle = mean(values);
  return values.reduce((sum, value) => sum + (value - middle) ** 2, 0) / (values.length - 1);
}
