/* The recommendation of studylib/report/recipes.py in the browser, and what shows it: a figure, sliders, a table. */

/* The rule of recipes.choose. Candidates come by size; budget: MB or null; tolerance: a share. Indices, or null. */
function choose(family, budget, tolerance) {
  const all = family.candidates, reference = all[family.reference];
  const near = (i) => all[i].loss <= (1 + tolerance) * reference.loss;
  const smaller = (i) => all[i].size <= (1 - family.saving) * reference.size;
  const every = all.map((_, i) => i), first = every.find(near);
  let fitting;
  if (budget !== null) fitting = every.filter((i) => all[i].size <= budget);
  else if (smaller(first)) fitting = every.filter((i) => all[i].size <= all[first].size);
  else {
    fitting = every.filter(smaller);
    if (!fitting.length) fitting = every.filter((i) => near(i) && all[i].size <= reference.size);
  }
  if (!fitting.length) return null;
  const [best, ...others] = [...fitting].sort((a, b) => all[a].loss - all[b].loss);
  const equals = others.filter((i) =>
    i in all[best].same && others.length >= all[best].same[i]
    && all[i].loss <= (1 + tolerance) * all[best].loss && (near(i) || !near(best)));
  const known = [best, ...equals], trained = known.every((i) => all[i].trained);
  const alike = known.filter((i) => all[i].trained === trained);
  const least = Math.min(...alike.map((i) => all[i].effort));
  const chosen = alike.find((i) => all[i].effort <= family.more * Math.max(least, 1 / 60));
  return { fitting, best, equals, chosen };
}

function explorer(root, families) {
  const $ = (name) => root.querySelector(`[data-part="${name}"]`);
  const make = (tag, fields, ...children) => {
    const node = tag.startsWith("svg:") ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
      : document.createElement(tag);
    for (const [name, value] of Object.entries(fields)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };
  const bits = (text) => text.split(/(\d+-\d+-\d+|LLM-QAT|QAT?-LoRA)/).map((part, at) => at % 2 ? make("span", { class: "bits" }, part) : part);
  const number = (x) => x >= 999.5 ? x.toLocaleString("en", { maximumFractionDigits: 0 }) : x.toPrecision(3);
  const share = (x) => `${x < 0 ? "−" : ""}${Math.abs(100 * x).toFixed(1)}%`;
  const above = (c) => (c.above[0] === null ? "∞" : share(c.above[0])) + (c.above.includes(null) ? "" : ` [${share(c.above[1])}, ${share(c.above[2])}]`);
  const time = (minutes) => minutes < 2 ? `${(60 * minutes).toFixed(0)} s` : `${number(minutes)} min`;
  const made = (c) => `${time(c.minutes)}${c.trained ? "" : ", without training"}`;
  let family = families[0], picked = null, order = ["Size, MB", 1], found = null;

  const budget = () => Number($("budget").value) >= 1000 ? null : sizes()[0] + (sizes()[1] - sizes()[0]) * $("budget").value / 1000;
  const tolerance = () => $("tolerance").value / 100;
  const sizes = () => [family.candidates[0].size, family.candidates.at(-1).size];

  function recommend() {
    const mb = budget(), all = family.candidates, reference = all[family.reference];
    $("budget-text").textContent = mb === null ? "none" : `${number(mb)} MB`;
    $("tolerance-text").textContent = share(tolerance());
    found = choose(family, mb, tolerance());
    const text = $("recommendation");
    if (!found) return void (text.textContent = "Nothing that was run fits.");
    const c = all[found.chosen], same = [found.best, ...found.equals].filter((i) => i !== found.chosen);
    text.replaceChildren(make("strong", {}, ...bits(c.title)), `: ${family.measure} ${number(c.loss)}`,
      found.chosen === family.reference ? "" : `, ${above(c)} above ${reference.title}`,
      `, in ${number(c.size)} MB; made in ${made(c)}. `,
      ...bits(same.length ? `As good, as far as these data can tell: ${same.slice(0, 6).map((i) => all[i].title).join("; ")}`
        + (same.length > 6 ? ` and ${same.length - 6} more.` : ".") : "Nothing else that fits is as good."));
  }

  function draw() {
    const box = $("figure"), width = Math.max(300, box.clientWidth), height = Math.min(460, 0.62 * width + 80);
    const [left, right, top, bottom] = [58, 14, 12, 46], all = family.candidates, limit = family.limit;
    const [low, high] = sizes(), pad = 0.04 * (high - low) || 1, times = (c) => c.loss / all[family.reference].loss;
    const shown = all.map((c, i) => i).filter((i) => times(all[i]) <= limit);
    const most = Math.max(1.05, ...shown.map((i) => Math.min(limit, 1 + (all[i].above[2] ?? 0), 1.15 * times(all[i]))));
    const least = Math.min(0.99, ...shown.map((i) => times(all[i])));
    const x = (mb) => left + (mb - low + pad) / (high - low + 2 * pad) * (width - left - right);
    const y = (t) => top + (Math.log(most) - Math.log(t)) / (Math.log(most) - Math.log(least)) * (height - top - bottom);
    const svg = make("svg:svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img",
      "aria-label": `Size in MB against times the ${family.measure} of ${all[family.reference].title}` });
    const text = (at, up, words, more = {}) => svg.append(make("svg:text", { x: at, y: up, ...more }, words));
    const line = (x1, y1, x2, y2, more) => svg.append(make("svg:line", { x1, y1, x2, y2, ...more }));
    const band = Math.max(y(1 + tolerance()), top);
    svg.append(make("svg:rect", { x: left, y: band, width: width - left - right, height: y(1) - band, class: "band" }));
    for (const t of [0.8, 0.9, 1, 1.05, 1.1, 1.2, 1.5, 2, 3].filter((t) => t >= least && t <= most))
      if (most < 1.6 || ![1.05, 1.1].includes(t)) {
        line(left, y(t), width - right, y(t), { class: "grid" });
        text(left - 6, y(t) + 4, `${t}×`, { "text-anchor": "end" });
      }
    const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000, 20000].map((s) => s * 10 ** Math.floor(Math.log10(high - low || 1) - 2))
      .find((s) => (high - low) / s <= width / 90) ?? high - low;
    for (let mb = Math.ceil(low / step) * step; mb <= high + 1e-9; mb += step)
      text(x(mb), height - bottom + 16, Number(mb.toPrecision(6)).toLocaleString("en"), { "text-anchor": "middle" });
    text((left + width - right) / 2, height - 6, `Weights + cache of ${family.context} tokens, MB`, { "text-anchor": "middle" });
    text(12, (top + height - bottom) / 2, `Times the perplexity of ${all[family.reference].title}`,
      { "text-anchor": "middle", transform: `rotate(-90 12 ${(top + height - bottom) / 2})` });
    if (budget() !== null) line(x(budget()), top, x(budget()), height - bottom, { class: "budget" });
    const front = shown.filter((i) => all[i].front);
    svg.append(make("svg:polyline", { class: "front", points: front.map((i) => `${x(all[i].size)},${y(times(all[i]))}`).join(" ") }));
    for (const i of [...shown].sort((a, b) => all[a].front - all[b].front)) {
      const c = all[i], at = x(c.size), marked = found && (i === found.chosen), hit = $("filter").value && !matches(c);
      if (c.front && !c.above.includes(null))
        line(at, Math.max(y(1 + c.above[2]), top), at, Math.min(y(Math.max(1 + c.above[1], least)), height - bottom),
          { stroke: c.colour, class: hit ? "faint" : "" });
      if (marked) svg.append(make("svg:circle", { cx: at, cy: y(times(c)), r: 11, class: "ring" }));
      const dot = make("svg:circle", { cx: at, cy: y(times(c)), r: c.front ? 6 : 4, fill: c.hollow ? "#fff" : c.colour,
        stroke: c.colour, tabindex: 0, role: "button", class: hit ? "dot faint" : "dot", "aria-label": c.title },
        make("svg:title", {}, `${c.title}\n${family.measure} ${number(c.loss)}\n${above(c)} above ${all[family.reference].title}\n`
          + `${number(c.size)} MB\nmade in ${made(c)}`));
      dot.addEventListener("click", () => pick(i));
      dot.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault(); // a space would scroll
        pick(i);
      });
      svg.append(dot);
    }
    box.replaceChildren(svg);
    const methods = new Map(shown.map((i) => [all[i].method, all[i]]));
    $("legend").replaceChildren(...[...methods].map(([name, c]) => make("span", {}, make("i",
      { style: `border-color: ${c.colour}; background: ${c.hollow ? "#fff" : c.colour}` }), name)));
    $("left-out").textContent = shown.length < all.length
      ? `In the table alone, since their perplexity is more than ${limit} times as high: ${all.length - shown.length}.` : "";
  }

  function pick(i) {
    picked = i;
    const c = family.candidates[i];
    $("record").replaceChildren(make("strong", {}, ...bits(c.title)), make("p", {}, `study show ${c.keys.join(" · study show ")}`),
      make("pre", {}, JSON.stringify({ arm: c.arm, metrics: c.metrics, minutes: c.phases, peak_GiB: c.peak }, null, 1)));
    $("record").hidden = false;
    table();
  }

  const columns = [["Recipe", (c) => c.title, (c) => c.title], ["Size, MB", (c) => c.size, (c) => number(c.size)],
    ["Perplexity", (c) => c.loss, (c) => number(c.loss)], ["Above", (c) => c.above[0] ?? Infinity, above],
    ["Making it, min", (c) => c.minutes, (c) => c.minutes.toFixed(1)]];
  const matches = (c) => $("filter").value.toLowerCase().split(/\s+/).every((word) => c.title.toLowerCase().includes(word));
  function table() {
    const [name, sign] = order, column = columns.find(([title]) => title === name);
    const rows = family.candidates.map((c, i) => i).filter((i) => matches(family.candidates[i]));
    const value = (i) => column[1](family.candidates[i]);
    rows.sort((a, b) => sign * (typeof value(a) === "string" ? value(a).localeCompare(value(b)) : (value(a) > value(b)) - (value(a) < value(b))));
    const head = columns.map(([title], at) => {
      const words = title === "Above" ? `Above ${family.candidates[family.reference].title}` : title;
      const button = make("button", { type: "button" }, words + (title === column[0] ? (sign > 0 ? " ↑" : " ↓") : ""));
      button.addEventListener("click", () => { order = [title, title === column[0] ? -sign : 1]; table(); });
      return make("th", { scope: "col", class: at ? "number" : "" }, button);
    });
    const body = rows.map((i) => {
      const cells = columns.map(([, , text], at) => make("td", { class: at ? "number" : "" }, ...bits(text(family.candidates[i]))));
      const row = make("tr", { class: i === picked ? "picked" : found && i === found.chosen ? "chosen" : "" }, ...cells);
      row.addEventListener("click", () => pick(i));
      return row;
    });
    $("table").replaceChildren(make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body));
  }

  const update = () => { recommend(); draw(); table(); };
  families.forEach((own, at) => $("family").append(make("option", { value: at }, own.title)));
  $("family").addEventListener("change", () => { family = families[$("family").value]; picked = null; $("record").hidden = true; update(); });
  for (const part of ["budget", "tolerance", "filter"]) $(part).addEventListener("input", update);
  window.addEventListener("resize", draw);
  root.hidden = false;
  update();
}
