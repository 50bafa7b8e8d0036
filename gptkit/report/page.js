// Show the numbers under the pointer in each chart of report.py's page. The rest of the page works without this script.
"use strict";
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const chart = JSON.parse(figure.dataset.chart);
  const [width, left, right] = chart.plot;
  const [low, high] = chart.x;
  const [svg, cursor, tip] = ["svg", ".cursor", ".tip"].map((name) => figure.querySelector(name));
  const shown = (value) => value.toLocaleString("ja-JP", { maximumSignificantDigits: 5 });
  const element = (kind, className, ...inside) => {
    const made = document.createElement(kind);
    made.className = className;
    made.append(...inside);
    return made;
  };
  const nearest = (points, x) => points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const place = ((event.clientX - box.left) / box.width) * width;
    const wanted = low + ((Math.min(Math.max(place, left), right) - left) / (right - left)) * (high - low);
    const found = chart.curves.map((curve) => ({ curve, point: nearest(curve.points, wanted) }));
    const x = nearest(found.map(({ point }) => point), wanted)[0];
    const at = left + ((x - low) / (high - low)) * (right - left);
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.classList.add("shown");
    const lines = found.map(({ curve, point }) =>
      element("div", `run c${curve.colour}${curve.faint ? " faint" : ""}`, element("i", ""), `${curve.name} ${shown(point[1])}`),
    );
    tip.replaceChildren(element("small", "", `${chart.xLabel} ${shown(x)}`), ...lines);
    tip.hidden = false;
    const middle = svg.offsetLeft ?? 0;
    const along = ((at / width) * box.width) + (box.left - figure.getBoundingClientRect().left) + middle;
    const isRight = at > width / 2;
    tip.style.left = `${Math.max(isRight ? along - tip.offsetWidth - 10 : along + 10, 4)}px`;
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    cursor.classList.remove("shown");
  });
}
