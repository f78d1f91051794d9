/** Arithmetic of charts: ranges, ticks, and what is left of a curve on a row of pixels. Pure. */

/** Smallest and largest finite value of several columns; null when there is none. */
export function extent(columns) {
  const finite = columns.flat().filter(Number.isFinite);
  const most = (pick) => finite.reduce((a, b) => pick(a, b));
  return finite.length ? [most(Math.min), most(Math.max)] : null;
}

/** Widen a range by a share of its length, so that no line runs along the frame. */
export function padded([low, high], share, isLog) {
  const half = (Math.abs(low) || 1) / 2;
  if (low === high) return isLog ? [low / 2, high * 2] : [low - half, high + half];
  const grow = isLog ? (high / low) ** share : (high - low) * share;
  return isLog ? [low / grow, high * grow] : [low - grow, high + grow];
}

/** A function from data to pixels, with `invert` for the way back. */
export function scale([d0, d1], [p0, p1], isLog = false) {
  const [into, back] = isLog ? [Math.log, Math.exp] : [Number, Number];
  const slope = (p1 - p0) / (into(d1) - into(d0) || 1);
  const toPx = (value) => p0 + (into(value) - into(d0)) * slope;
  return Object.assign(toPx, { invert: (px) => back(into(d0) + (px - p0) / slope) });
}

/** Round values inside [low, high], about `count` of them, 1, 2 or 5 times a power of ten apart. */
export function niceTicks(low, high, count = 5) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * (rough < 1.5 * power ? 1 : rough < 3.3 * power ? 2 : rough < 7.1 * power ? 5 : 10);
  const decimals = Math.max(0, -Math.floor(Math.log10(step)));
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    ticks.push(Number((i * step).toFixed(Math.min(decimals, 20))));
  }
  return ticks;
}

/** Powers of ten inside the range, with 2 and 5 between where there is room; data values, not logs. */
export function logTicks(low, high, count = 5) {
  const [from, to] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const every = Math.max(1, Math.round((to - from) / count));
  const powers = Array.from({ length: to - from + 1 }, (_, i) => from + i);
  const ticks = (some, digits) => some.flatMap((power) => digits.map((digit) => Number(`${digit}e${power}`)))
    .filter((value) => value >= low * 0.999 && value <= high * 1.001);
  const tens = ticks(powers.filter((_, i) => i % every === 0), [1]);
  if (tens.length >= Math.min(3, count)) return tens;
  const fine = ticks(powers, [1, 2, 5]);
  return fine.length >= 2 ? fine : niceTicks(low, high, count);
}

const TIME_STEPS = [1, 5, 15, 30, 60, 300, 900, 1800, 3600, 10800, 21600, 43200, 86400, 172800, 604800,
  2592000, 31536000];

/** Round local times, in unix seconds, inside [low, high]. */
export function timeTicks(low, high, count = 5) {
  const step = TIME_STEPS.find((s) => (high - low) / s <= count) ?? TIME_STEPS.at(-1);
  const zone = new Date(low * 1000).getTimezoneOffset() * 60;
  const ticks = [];
  for (let t = Math.ceil((low - zone) / step) * step + zone; t <= high; t += step) ticks.push(t);
  return ticks;
}

/** A time tick's text: as fine as the range shown needs. */
export function timeLabel(seconds, span) {
  const at = new Date(seconds * 1000).toLocaleString("sv-SE"); // 2026-11-24 14:03:22
  if (span < 300) return at.slice(11);
  return span < 86400 * 2 ? at.slice(11, 16) : at.slice(5, 10);
}

/** Index of the value nearest to `x`; the column may step back (a resumed run), -1 if it is empty. */
export const nearest = (xs, x) =>
  xs.reduce((best, value, i) => (best < 0 || Math.abs(value - x) < Math.abs(xs[best] - x) ? i : best), -1);

/**
 * Reduce a curve's buckets to one per pixel column, extremes kept.
 *
 * Args: columns {x, first, min, max, last} of equal length; a bucket without finite value (null)
 * breaks the line, and so does an x that steps back.
 * Returns [{px, first, min, max, last, isNew}], isNew where a new stretch of line begins.
 */
export function pixelColumns({ x, first, min, max, last }, toPx, from, to, isShown = () => true) {
  const out = [];
  let isNew = true;
  let before = null;
  for (let i = 0; i < x.length; i++) {
    if (x[i] < before) isNew = true;
    before = x[i];
    // One neighbour beyond each edge stays, so that a zoomed line runs to the frame.
    if ((x[i] < from && x[i + 1] < from) || (x[i] > to && x[i - 1] > to)) continue;
    if (min[i] === null || !isShown(min[i])) {
      isNew = true;
      continue;
    }
    const px = toPx(x[i]);
    const open = out.at(-1);
    if (!isNew && Math.floor(open.px) === Math.floor(px)) {
      open.min = Math.min(open.min, min[i]);
      open.max = Math.max(open.max, max[i]);
      open.last = last[i] ?? open.last;
    } else {
      out.push({ px, first: first[i] ?? min[i], min: min[i], max: max[i], last: last[i] ?? max[i], isNew });
    }
    isNew = false;
  }
  return out;
}
