"use strict";
// Scores what is ticked again, as pepr.score and pepr.pareto_front do, and moves the figures.
document.addEventListener("DOMContentLoaded", () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const prefixes = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""], [1e-3, "m"], [1e-6, "µ"], [1e-9, "n"]];

  const amount = (value, unit) => {
    if (!unit) return String(Number(value.toPrecision(4)));
    if (unit === "s" && value >= 60) {
      const s = Math.round(value), min = Math.round(value / 60), h = Math.round(min / 60);
      const two = (n) => String(n).padStart(2, "0");
      if (s < 3600) return `${Math.floor(s / 60)} min ${two(s % 60)} s`;
      if (min < 1440) return `${Math.floor(min / 60)} h ${two(min % 60)} min`;
      return `${Math.floor(h / 24)} d ${two(h % 24)} h`;
    }
    if (!["J", "g", "B", "s"].includes(unit)) return `${value.toPrecision(4)} ${unit}`; // a currency takes no prefix
    if (value === 0) return `0 ${unit}`;
    const [size, prefix] = prefixes.find(([s]) => Math.abs(value) >= s * 0.99995) ?? prefixes.at(-1);
    return `${(value / size).toPrecision(4)} ${prefix}${unit}`;
  };

  const score = (ranking, p, rows) => {
    const r = ranking.resource;
    let [low, high] = ranking.bounds ?? [Infinity, -Infinity];
    if (!ranking.bounds) for (const i of rows) { low = Math.min(low, r[i]); high = Math.max(high, r[i]); }
    if (!(low < high)) return null;
    const norm = (x) => Math.min(1, Math.max(0, (x - low) / (high - low)));
    const pepr = new Map(rows.map((i) => [i, p[i] / (1 + norm(r[i]))]));
    const order = [...rows].sort((a, b) => pepr.get(b) - pepr.get(a) || a - b);
    const front = new Set();
    const cheap = [...rows].sort((a, b) => r[a] - r[b] || p[b] - p[a]);
    let best = -Infinity;
    for (let i = 0; i < cheap.length;) {
      let j = i;
      while (j < cheap.length && r[cheap[j]] === r[cheap[i]]) j++;
      const top = p[cheap[i]];
      if (top > best) for (const k of cheap.slice(i, j)) if (p[k] === top) front.add(k);
      best = Math.max(best, top);
      i = j;
    }
    return { low, high, norm, pepr, order, front };
  };

  const paths = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

  const redraw = (chart, group, result, ticked) => {
    for (const size of ["wide", "narrow"]) {
      const at = chart.places[size];
      const part = (name) => document.getElementById(`${chart.id}-${size}-${name}`);
      const X = (x) => at.x[0] * (chart.places.log ? Math.log10(x) : x) + at.x[1];
      const Y = (y) => at.y[0] * y + at.y[1];
      group.p.forEach((_, i) => {
        for (const name of ["point", "name", "barx", "bary"])
          part(`${name}-${i}`)?.classList.toggle("gone", !ticked.has(i));
      });
      for (const run of document.querySelectorAll(`[id^="${chart.id}-${size}-run-"]`)) {
        const row = Number(run.id.split("-run-")[1]);
        run.classList.toggle("gone", !ticked.has(row));
      }
      if (chart.kind === "score") {
        const before = group.resources[chart.ranking].pepr;
        group.p.forEach((_, i) => {
          const shift = result && ticked.has(i) ? Y(result.pepr.get(i)) - Y(before[i]) : 0;
          for (const name of ["point", "name", "barx", "bary"])
            part(`${name}-${i}`)?.setAttribute("transform", `translate(0 ${shift.toFixed(2)})`);
        });
        continue;
      }
      const resource = group.resources[chart.ranking].resource;
      const median = part("median")?.querySelector("path");
      if (median && ticked.size) {
        const taken = [...ticked].map((i) => resource[i]).sort((a, b) => a - b), m = taken.length >> 1;
        const middle = taken.length % 2 ? taken[m] : (taken[m - 1] + taken[m]) / 2;
        median.setAttribute("d", median.getAttribute("d").replace(/^M[-\d.]+/, `M${X(middle).toFixed(1)}`));
      }
      if (!result) continue;
      const front = [...result.front].sort((a, b) => resource[a] - resource[b]);
      part("front")?.querySelector("path")?.setAttribute("d", paths(front.map((i) => [X(resource[i]), Y(group.p[i])])));
      const [x0, x1] = at.xlim, steps = 128;
      for (const level of data.levels) {
        const leaves = (of) => X(of.low + (at.top / level - 1) * (of.high - of.low));
        const shift = leaves(result) - leaves(chart.first ??= result);
        part(`isoname-${level}`)?.setAttribute("transform", `translate(${shift.toFixed(2)} 0)`);
        const line = part(`iso-${level}`)?.querySelector("path");
        line?.setAttribute("d", paths(Array.from({ length: steps }, (_, k) => {
          const x = x0 + (x1 - x0) * k / (steps - 1);
          const r = chart.places.log ? 10 ** x : x;
          return [at.x[0] * x + at.x[1], Y(level * (1 + result.norm(r)))];
        })));
      }
    }
  };

  for (const section of document.querySelectorAll("section.group")) {
    const group = data.groups[Number(section.dataset.group)];
    const body = section.querySelector("tbody"), said = section.querySelector(".said");
    const reset = section.querySelector(".reset");
    const rows = [...body.rows];
    let sorted = "rank", rising = true, results = [];
    const index = (row) => Number(row.dataset.row);

    const values = {
      rank: (i) => results[0] ? (results[0].order.indexOf(i) + 1 || Infinity) : Infinity,
      name: (i) => group.names[i], p: (i) => group.p[i],
      runs: (i) => group.runs[i], parameters: (i) => group.parameters[i] ?? -1,
    };
    group.resources.forEach((resource, k) => {
      values[`r${k}`] = (i) => resource.resource[i];
      values[`s${k}`] = (i) => results[k]?.pepr.get(i) ?? -1;
    });

    const arrange = () => {
      const focused = document.activeElement;
      const of = values[sorted], sign = rising ? 1 : -1;
      rows.sort((a, b) => {
        const x = of(index(a)), y = of(index(b));
        return sign * (x < y ? -1 : x > y ? 1 : 0) || index(a) - index(b);
      });
      body.append(...rows);
      focused?.focus({ preventScroll: true });
      for (const button of section.querySelectorAll("th button")) {
        const th = button.closest("th");
        if (button.dataset.sort === sorted) th.setAttribute("aria-sort", rising ? "ascending" : "descending");
        else th.removeAttribute("aria-sort");
      }
    };

    const update = () => {
      const ticked = new Set(rows.filter((row) => row.querySelector("input").checked).map(index));
      const whole = ticked.size === rows.length;
      results = group.resources.map((resource) => score(resource, group.p, [...ticked].sort((a, b) => a - b)));
      for (const row of rows) {
        const i = index(row), used = ticked.has(i);
        row.classList.toggle("out", !used);
        for (const pm of row.querySelectorAll(".pm")) pm.hidden = !whole;
        const place = used && results[0] ? String(results[0].order.indexOf(i) + 1) : "–";
        row.querySelector('[data-key="rank"]').firstChild.textContent = place;
        group.resources.forEach((_, k) => {
          const value = used ? results[k]?.pepr.get(i) : undefined;
          const cell = row.querySelector(`[data-key="s${k}"]`);
          cell.querySelector(".score").textContent = value === undefined ? "–" : value.toFixed(3);
          cell.querySelector(".star").textContent = used && results[k]?.front.has(i) ? "★" : "";
          if (k === 0) row.querySelector(".bar span").style.width = `${100 * (value ?? 0)}%`;
        });
      }
      for (const chart of group.charts) redraw(chart, group, results[chart.ranking], ticked);
      reset.hidden = whole;
      const first = results[0], unit = group.resources[0].unit;
      said.textContent = whole ? "" : !first
        ? `${ticked.size} of ${rows.length}: no score, as these all took the same`
        : `${ticked.size} of ${rows.length}, normalisation range ${amount(first.low, unit)} … ${amount(first.high, unit)}; ` +
          `best is ${group.names[first.order[0]]}, ${first.pepr.get(first.order[0]).toFixed(3)}. ` +
          "The ± belong to the whole comparison and are hidden for now.";
    };

    body.addEventListener("change", () => { update(); if (sorted === "rank" || sorted.startsWith("s")) arrange(); });
    reset.addEventListener("click", () => {
      for (const row of rows) row.querySelector("input").checked = true;
      update(); arrange(); rows[0].querySelector("input").focus();
    });
    for (const button of section.querySelectorAll("th button"))
      button.addEventListener("click", () => {
        const key = button.dataset.sort;
        rising = sorted === key ? !rising : ["rank", "name", "parameters"].includes(key) || key.startsWith("r");
        sorted = key;
        arrange();
      });
    update();
  }
});
