"use strict";
// Draws the figures of the page. Plotly and the figures are gzip in base64: see payload.py.
(async () => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 640px)");
  let printing = false;
  let folded = [];

  async function unpack(id) {
    const letters = atob(document.getElementById(id).textContent);
    const bytes = Uint8Array.from(letters, (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  function template() {
    const night = dark.matches && !printing;
    const [text, line, soft, box] = night
      ? ["#e6e9ed", "#39424d", "#9aa4af", "#222831"]
      : ["#1b1f24", "#dfe4e9", "#57606a", "#ffffff"];
    const axis = {
      gridcolor: line, linecolor: line, zerolinecolor: line, tickcolor: line,
      tickfont: { color: soft }, title: { font: { color: soft } },
    };
    return {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: text },
        colorway: ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"],
        xaxis: axis, yaxis: axis, legend: { bgcolor: "rgba(0,0,0,0)" },
        hoverlabel: { bgcolor: box, bordercolor: soft, font: { color: text } },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: text },
        sliderdefaults: {
          bgcolor: line, bordercolor: soft, activebgcolor: soft, tickcolor: soft,
          font: { color: soft }, currentvalue: { font: { color: text } },
        },
      },
    };
  }

  // Room is scarce on a narrow screen: the color bar moves above the map, margins shrink.
  function fitted(layout) {
    const small = narrow.matches;
    const copy = structuredClone(layout);
    copy.template = template();
    copy.autosize = true;
    copy.margin = { ...copy.margin, l: small ? 44 : 64, r: small ? 8 : 16, t: small ? 12 : 20 };
    if (small) copy.font = { ...copy.font, size: 11 };
    const bar = copy.coloraxis && copy.coloraxis.colorbar;
    if (bar && small) {
      Object.assign(bar, { orientation: "h", y: 1.01, yanchor: "bottom", thickness: 10 });
      bar.title = { ...bar.title, side: "right" };
      copy.margin.t = 56;
    }
    return copy;
  }

  // By default Plotly has a button that uploads a figure; these are the only buttons here.
  const config = { displaylogo: false, responsive: true, displayModeBar: true,
    showSendToCloud: false, modeBarButtons: [["toImage", "resetScale2d"]] };

  const plots = [...document.querySelectorAll("[data-figure]")];
  const chosen = new Map();
  const moved = new Map();  // where sliders stood before the page was loaded anew
  const kept = "drlora report";
  let figures;

  function keep() {
    const of = (plot) => plot.dataset.figure;
    const sliders = plots.filter((plot) => plot.layout && plot.layout.sliders);
    const places = sliders.map((plot) => {
      const { active, steps } = plot.layout.sliders[0];
      const first = figures[of(plot)][0].figure.layout.sliders[0].active;  // stays where it begins
      return [of(plot), active === first ? null : steps[active].label];
    });
    const choices = [...chosen].map(([plot, number]) => [of(plot), number]);
    sessionStorage.setItem(kept, JSON.stringify({ places, choices }));
  }

  function choose(list) {
    const plot = plots.find((each) => each.dataset.figure === list.dataset.for);
    chosen.set(plot, Number(list.value));
    list.parentElement.dataset.chosen = list.selectedOptions[0].text;
    return plot;
  }

  function restore() {
    const { places, choices } = JSON.parse(sessionStorage.getItem(kept) || "{}");
    sessionStorage.removeItem(kept);
    const plotOf = (key) => plots.find((plot) => plot.dataset.figure === key);
    for (const [key, label] of places || []) if (label !== null) moved.set(plotOf(key), label);
    for (const [key, number] of choices || []) {
      const list = document.querySelector(`select[data-for="${key}"]`);
      if (!list || number >= list.options.length) continue;
      list.value = number;
      choose(list);
    }
  }

  function draw(plot) {
    const { figure } = figures[plot.dataset.figure][chosen.get(plot) || 0];
    // A map that is drawn anew keeps the state that its slider shows.
    let visible = plot.data && plot.layout.sliders && plot.data.map((trace) => trace.visible);
    let active = visible && plot.layout.sliders[0].active;
    const layout = fitted(figure.layout);
    const back = layout.sliders && moved.has(plot)
      ? layout.sliders[0].steps.findIndex((step) => step.label === moved.get(plot)) : -1;
    moved.delete(plot);
    if (back >= 0) {
      active = back;
      visible = figure.data.map((_, at) => at === back);
    }
    const data = figure.data.map((trace, at) => (visible ? { ...trace, visible: visible[at] } : trace));
    if (visible) layout.sliders[0].active = active;
    // Not `react`: it leaves parts of a color bar that has moved.
    return Plotly.newPlot(plot, data, layout, config);
  }

  async function drawAll() {
    for (const plot of plots) await draw(plot);
  }

  function watch() {
    const own = document.body.dataset.version;
    setInterval(async () => {
      try {
        const answer = await fetch("version");
        if (answer.ok && (await answer.text()) !== own) {
          keep();
          location.reload();
        }
      } catch { /* the server is gone; the page stays */ }
    }, 2000);
  }

  try {
    const script = document.createElement("script");
    script.textContent = await unpack("plotly-source");
    document.head.append(script);
    figures = JSON.parse(await unpack("figure-data"));
    restore();
    await drawAll();
    for (const list of document.querySelectorAll("select[data-for]")) {
      list.addEventListener("change", () => draw(choose(list)));
    }
    dark.addEventListener("change", drawAll);
    narrow.addEventListener("change", drawAll);
    addEventListener("beforeprint", () => {
      printing = true;
      folded = [...document.querySelectorAll("details:not([open])")];
      for (const each of folded) each.open = true;
      for (const plot of plots) { plot.style.width = "680px"; draw(plot); }
    });
    addEventListener("afterprint", () => {
      printing = false;
      for (const each of folded) each.open = false;
      for (const plot of plots) { plot.style.width = ""; draw(plot); }
    });
    document.body.dataset.drawn = "yes";
  } catch (error) {
    const failed = document.getElementById("failed");
    failed.querySelector("span").textContent = `${error}. A browser from 2023 or later is needed.`;
    failed.hidden = false;
  }
  if (document.body.dataset.version) watch();
})();
