// A square in which a point is dragged, by mouse, finger or arrow keys.

export class Plane {
  /** onmove() after each move; x and y in [-1, 1], y upwards. */
  constructor(element, point, caption, onmove) {
    Object.assign(this, { element, point, caption, onmove, x: 0, y: 0 });
    element.addEventListener("pointerdown", (event) => {
      element.setPointerCapture(event.pointerId);
      this.follow(event);
    });
    element.addEventListener("pointermove", (event) => element.hasPointerCapture(event.pointerId) && this.follow(event));
    element.addEventListener("keydown", (event) => {
      const by = event.shiftKey ? 0.2 : 0.04;
      const moves = { ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, by], ArrowDown: [0, -by] };
      if (!(event.key in moves)) return;
      event.preventDefault();
      this.move(this.x + moves[event.key][0], this.y + moves[event.key][1]);
    });
    this.draw();
  }

  follow(event) {
    const box = this.element.getBoundingClientRect();
    this.move(((event.clientX - box.left) / box.width) * 2 - 1, 1 - ((event.clientY - box.top) / box.height) * 2);
  }

  move(x, y) {
    const inside = (value) => Math.min(1, Math.max(-1, value));
    [this.x, this.y] = [inside(x), inside(y)];
    this.draw();
    this.onmove();
  }

  draw() {
    this.point.style.left = `${(this.x + 1) * 50}%`;
    this.point.style.top = `${(1 - this.y) * 50}%`;
    this.caption.textContent = `noise at ${this.x.toFixed(2)}, ${this.y.toFixed(2)}`;
  }
}
