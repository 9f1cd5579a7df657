// Gaussian noise from a seed, and the plane of noise that the point moves in.

/** Uniform numbers in [0, 1) from a 32-bit seed (mulberry32). */
function uniform(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let x = Math.imul(state ^ (state >>> 15), 1 | state);
    x = (x + Math.imul(x ^ (x >>> 7), 61 | x)) ^ x;
    return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** `count` standard Gaussian numbers (Box and Muller), the same for the same seed. */
export function gaussian(seed, count) {
  const draw = uniform(seed);
  const result = new Float32Array(count);
  for (let i = 0; i < count; i += 2) {
    const radius = Math.sqrt(-2 * Math.log(1 - draw()));
    const angle = 2 * Math.PI * draw();
    result[i] = radius * Math.cos(angle);
    if (i + 1 < count) result[i + 1] = radius * Math.sin(angle);
  }
  return result;
}

/** Three noises span a sphere, so that the noise at every place (x, y) in [-1, 1]^2 is standard Gaussian too. */
export class NoisePlane {
  constructor(seed, count) {
    const all = gaussian(seed, 3 * count);
    this.parts = [0, 1, 2].map((i) => all.subarray(i * count, (i + 1) * count));
  }

  /** The noise at a place: weights whose squares add up to 1. */
  at(x, y) {
    const [a, b] = [(x * Math.PI) / 2, (y * Math.PI) / 2];
    const weights = [Math.cos(a) * Math.cos(b), Math.sin(a) * Math.cos(b), Math.sin(b)];
    const [p, q, r] = this.parts;
    return p.map((value, i) => weights[0] * value + weights[1] * q[i] + weights[2] * r[i]);
  }
}
