"use strict";
(() => {
  const { theme, plots } = JSON.parse(document.getElementById("plots").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)").matches;
  // Legends below a narrow plot stand one below the other, else the page would cut them off.
  if (window.innerWidth < 600) {
    theme.legend.columns = 2;
    theme.legend.layout = { bottom: { direction: "vertical", anchor: "start" } };
  }
  const options = {
    actions: false,
    config: theme,
    mode: "vega-lite",
    renderer: "svg",
    tooltip: { theme: dark ? "dark" : "light" },
  };

  // A browser may print or narrow the page at any time: Vega follows the window, the page gives each plot its width.
  const draw = async (name, spec) => {
    const place = document.getElementById(`plot-${name}`);
    try {
      const stage = document.createElement("div"); // Vega gives it a role and a label of its own
      place.append(stage);
      const { view } = await vegaEmbed(stage, spec, options);
      place.dataset.drawn = "yes";
      const button = document.querySelector(`button[data-plot="${name}"]`);
      button.hidden = false;
      button.addEventListener("click", async () => {
        const link = document.createElement("a");
        link.href = await view.toImageURL("svg");
        link.download = `${name}.svg`;
        link.click();
      });
    } catch (error) {
      place.dataset.drawn = "no";
      place.textContent = `This plot could not be drawn: ${error.message}`;
      console.error(`plot ${name}: ${error.message}`);
    }
  };

  const drawAll = async () => {
    for (const [name, spec] of Object.entries(plots)) {
      await draw(name, spec);
    }
    document.documentElement.dataset.drawn = "yes";
  };
  drawAll();
})();
