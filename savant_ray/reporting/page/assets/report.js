"use strict";
// Draws the curves with uPlot; charts share the cursor and follow the width and the colors of the page.

const charts = JSON.parse(document.getElementById("charts-data").textContent);
const figures = [...document.querySelectorAll("figure.chart")];
const logX = document.getElementById("log-x");
const shared = uPlot.sync("steps");
let plots = [];

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const axisFont = "12px system-ui, sans-serif";
const exact = (value) => value == null ? "–" : value.toLocaleString("en", {maximumSignificantDigits: 5});
const short = new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 3});
const tick = (value) => value !== 0 && Math.abs(value) < 0.001 ? value.toExponential() : short.format(value);

const STYLES = {
  raw: {width: 1, points: {show: false}},
  smooth: {width: 2, points: {show: false}},
  points: {width: 2, dash: [6, 4], points: {show: true, size: 6}},
  limit: {width: 1, dash: [2, 4], points: {show: false}},
};

// Each run has a color; in a report of one run its validations have the next color.
function series({label, run, style}, curves) {
  const isOnlyRun = curves.every((curve) => curve.run === run);
  const stroke = color(`--run-${(run + (isOnlyRun && style === "points" ? 1 : 0)) % 6}`);
  const hasSmooth = curves.some((curve) => curve.run === run && curve.style === "smooth");
  const {points, ...look} = STYLES[style];
  return {label, stroke, spanGaps: true, points: {...points, fill: stroke}, value: (_, value) => exact(value), ...look,
          alpha: style === "raw" && hasSmooth ? 0.35 : 1};
}

function columns(chart) {
  const positive = logX.checked ? chart.steps.findIndex((step) => step > 0) : 0;  // a logarithmic axis has no step 0
  const first = positive < 0 ? chart.steps.length : positive;
  const values = chart.series.map((curve) => curve.values.slice(first));
  return [chart.steps.slice(first), ...values.map((column) => chart.logarithmic ? column.map((v) => v > 0 ? v : null) : column)];
}

function size(figure) {
  const wide = figure.classList.contains("wide");
  return {width: figure.clientWidth - 24, height: wide ? 340 : 220};
}

function draw(figure) {
  const chart = charts[figure.dataset.chart];
  const axis = {stroke: color("--quiet"), font: axisFont, grid: {stroke: color("--grid"), width: 1}, ticks: {stroke: color("--grid"), width: 1}};
  figure.querySelector("figcaption").textContent = chart.unit ? `${chart.title}, ${chart.unit}` : chart.title;
  return new uPlot({
    ...size(figure),
    scales: {x: {time: false, distr: logX.checked ? 3 : 1}, y: {distr: chart.logarithmic ? 3 : 1}},
    axes: [
      {...axis, values: (_, values) => values.map((value) => value == null ? "" : tick(value))},
      {...axis, size: 58, values: (_, values) => values.map((value) => value == null ? "" : tick(value))},
    ],
    cursor: {sync: {key: shared.key}, drag: {x: true, y: false}, points: {size: 6}},
    series: [{label: "step", value: (_, value) => exact(value)}, ...chart.series.map((curve) => series(curve, chart.series))],
  }, columns(chart), figure);
}

function drawAll() {
  plots.forEach((plot) => plot.destroy());
  plots = figures.map(draw);
}

if (figures.length) {
  drawAll();
  logX.addEventListener("change", drawAll);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  new ResizeObserver(() => plots.forEach((plot, i) => plot.setSize(size(figures[i])))).observe(document.querySelector(".charts"));
}
for (const time of document.querySelectorAll("time[data-time]")) {
  time.textContent = new Date(1000 * time.dataset.time).toLocaleString([], {dateStyle: "medium", timeStyle: "short"});
}
document.documentElement.dataset.drawn = Math.round(performance.now());
