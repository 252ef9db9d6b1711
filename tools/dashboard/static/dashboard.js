"use strict";
// Seeking, shot bars, clips that play in step, keys of the vote, charts. Everything else is HTML.

// -- an open page that asks again is not redrawn when nothing has changed
const seenEtags = new WeakMap();
document.addEventListener("htmx:beforeSwap", (event) => {
  const { target, xhr } = event.detail;
  // errors of a form are pages too, and the reader has to see them
  if ([400, 401, 403, 429].includes(xhr.status)) {
    event.detail.shouldSwap = true;
    event.detail.isError = false;
  }
  if (!event.detail.elt.hasAttribute("data-live")) return;
  const etag = xhr.getResponseHeader("etag");
  if (etag && seenEtags.get(target) === etag) event.detail.shouldSwap = false;
  if (etag) seenEtags.set(target, etag);
});

// -- the clip of a case: a shot's button or bar seeks, a line shows where it is
document.addEventListener("click", (event) => {
  const seek = event.target.closest("[data-seek]");
  if (!seek) return;
  const video = document.querySelector("#player video");
  if (!video) return;
  video.currentTime = Number(seek.dataset.seek) + 0.001;
  video.play().catch(() => {});
});
document.addEventListener("timeupdate", (event) => {
  const line = event.target.closest(".player")?.querySelector(".shots .now");
  if (!line || !event.target.duration) return;
  const place = `${(100 * event.target.currentTime) / event.target.duration}%`;
  line.setAttribute("x1", place);
  line.setAttribute("x2", place);
}, true);

// -- clips of one group start, stop and seek together
function clipsOf(group) {
  return [...document.querySelectorAll(`[data-group="${group}"] video`)];
}
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-play]");
  if (!button) return;
  const clips = clipsOf(button.dataset.play);
  const start = clips.some((clip) => clip.paused);
  for (const clip of clips) {
    if (!start) { clip.pause(); continue; }
    clip.currentTime = 0;
    clip.play().catch(() => {});
  }
});

// -- an answer given before the page is complete waits until htmx knows its form. The browser would
// send the form itself, as a GET that records nothing. (After a swap htmx is as quick as the page:
// defaultSettleDelay is 0 in base.html, instead of 20 ms in which a key pressed early was lost.)
let isComplete = false;
const early = new Map();
document.addEventListener("submit", (event) => {
  if (isComplete || !event.target.hasAttribute("hx-post")) return;
  event.preventDefault();
  event.stopPropagation();
  if (!early.has(event.target)) early.set(event.target, event.submitter);
  else notCounted();
}, true);
addEventListener("DOMContentLoaded", () => {
  isComplete = true;
  const missed = sessionStorage.getItem(NOT_COUNTED);
  // htmx learns from a click which button it was
  for (const [form, button] of early) button ? button.click() : form.requestSubmit();
  early.clear();
  if (missed) notCounted();
});

// -- vote: one answer to a question. What is pressed while that is on its way may have been meant for
// the next one, which nobody has seen yet: it doesn't count, and the page says so until the next
// answer, also where that page is a new one.
const NOT_COUNTED = "vote-not-counted", answered = new WeakSet();
function notCounted() {
  sessionStorage.setItem(NOT_COUNTED, "1");
  const notice = document.querySelector("#not-counted");
  if (notice) notice.hidden = false;
}
document.addEventListener("submit", (event) => {
  if (!answered.has(event.target)) return;
  event.preventDefault();
  event.stopPropagation();
  notCounted();
}, true);
document.addEventListener("htmx:beforeRequest", (event) => {
  if (!event.target.matches("form.question")) return;
  answered.add(event.target);
  sessionStorage.removeItem(NOT_COUNTED);
  document.querySelector("#not-counted").hidden = true;
});
document.addEventListener("htmx:afterRequest", (event) => {
  if (!event.detail.successful) answered.delete(event.target);
});

// -- vote: 1 left, 2 right, 0 the same, 9 neither is usable; a key that is held down is pressed once
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, textarea, select") || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.repeat) return;
  const button = document.querySelector(`[data-key="${CSS.escape(event.key)}"]`);
  if (button) { event.preventDefault(); button.click(); }
});

// -- charts
const COLORS = ["#2f78c4", "#d9822b", "#2f9e69", "#b0508f", "#8a63d2", "#cf4b42", "#4aa3a3", "#8d7b2f"];
const plots = new Map();

function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function joined(series, steps) {
  return uPlot.join(series.map((each) => [steps[each.steps], each.values]));
}

function shortNumber(value) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) return value.toExponential(3);
  return String(Number(value.toPrecision(5)));
}

function draw(holder, chart, data) {
  const stepLabel = data.step;
  const dashes = new Map();
  const series = chart.series.map((each, place) => {
    const seen = dashes.get(each.run) ?? 0;
    if (!each.faint) dashes.set(each.run, seen + 1);
    const manyRuns = new Set(chart.series.map((one) => one.run)).size > 1;
    const byRun = manyRuns || chart.series.some((one) => one.faint);
    const color = COLORS[(byRun ? each.run : place) % COLORS.length] + (each.faint ? "55" : "");
    return {
      label: each.label, stroke: color, width: 1.6, dash: manyRuns && seen ? [3 + 3 * seen, 4] : undefined,
      points: { show: each.values.length < 40, size: 5 }, spanGaps: false,
      value: (_, value) => shortNumber(value),
    };
  });
  const axis = { stroke: style("--quiet"), grid: { stroke: style("--line"), width: 1 }, ticks: { stroke: style("--line"), width: 1 } };
  const options = {
    width: Math.max(280, holder.clientWidth), height: 250, scales: { x: { time: false } },
    series: [{ label: stepLabel, value: (_, value) => shortNumber(value) }, ...series],
    axes: [
      { ...axis, label: stepLabel, labelSize: 22, size: 36 },
      { ...axis, label: chart.unit || chart.title, labelSize: 24, size: 78, values: (_, ticks) => ticks.map(shortNumber) },
    ],
  };
  holder.textContent = "";
  return new uPlot(options, joined(chart.series, data.steps), holder);
}

function show(container, data) {
  const names = data.charts.map((chart) => chart.name).join(" ");
  if (container.dataset.names !== names) {
    container.textContent = "";
    plots.clear();
    container.dataset.names = names;
    for (const chart of data.charts) {
      const section = document.createElement("section");
      section.className = "chart";
      const heading = document.createElement("h3");
      const title = document.createElement(chart.explained ? "a" : "span");
      if (chart.explained) {
        title.className = "term";
        title.href = `/explain/${encodeURIComponent(chart.name)}`;
      }
      title.textContent = chart.title;
      heading.append(title);
      const holder = document.createElement("div");
      holder.setAttribute("role", "img");
      holder.setAttribute("aria-label", chart.title);
      section.append(heading, holder);
      container.append(section);
    }
  }
  data.charts.forEach((chart, place) => {
    const holder = container.children[place].lastElementChild;
    const old = plots.get(chart.name);
    const labels = chart.series.map((each) => each.label).join("\n");
    if (old && old.labels === labels && old.dark === isDark()) {
      old.plot.setData(joined(chart.series, data.steps));
      return;
    }
    old?.plot.destroy();
    plots.set(chart.name, { labels, dark: isDark(), plot: draw(holder, chart, data) });
  });
}

function isDark() {
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

async function follow(container) {
  let etag = "";
  for (;;) {
    try {
      const answer = await fetch(container.dataset.charts, { headers: etag ? { "If-None-Match": etag } : {} });
      if (answer.status === 200) {
        etag = answer.headers.get("etag") ?? "";
        show(container, await answer.json());
      }
    } catch (error) {
      // the dashboard was stopped, or the laptop slept: the next round tries again
      console.info("no answer", error.message);
    }
    await new Promise((resolve) => setTimeout(resolve, 5000));
    while (document.hidden) await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

addEventListener("DOMContentLoaded", () => {
  for (const container of document.querySelectorAll("[data-charts]")) follow(container);
});
addEventListener("resize", () => {
  for (const { plot } of plots.values()) {
    plot.setSize({ width: Math.max(280, plot.root.parentElement.clientWidth), height: 250 });
  }
});
