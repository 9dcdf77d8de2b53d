"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  document.documentElement.classList.add("js");

  // Sort: a button in each header. What has no value stands last, whichever way; rows that are equal keep their order.
  const key = (row, column) => {
    const cell = row.cells[column];
    if (!cell) return null; // one wide cell says why there are no figures
    const text = cell.dataset.value ?? cell.textContent.trim();
    return text === "" ? null : text;
  };
  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
  };
  for (const table of all("table.sortable")) {
    const headers = all("thead th", table);
    headers.forEach((header, column) => {
      const button = header.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const now = header.getAttribute("aria-sort");
        const way = now ? (now === "ascending" ? "descending" : "ascending") : header.dataset.first ?? "ascending";
        headers.forEach((other) => other.removeAttribute("aria-sort"));
        header.setAttribute("aria-sort", way);
        const sign = way === "ascending" ? 1 : -1;
        const body = table.tBodies[0];
        const rows = all("tr", body).map((row) => [key(row, column), row]);
        rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b)));
        body.append(...rows.map(([, row]) => row));
      });
    });
  }

  // A small screen starts with headings; wide ones and paper show everything.
  if (matchMedia("(max-width: 46rem)").matches) all("details.kind, details.all-runs").forEach((group) => (group.open = false));

  // Filter: words, all of which a row (or the heading of its group) holds, and a choice of states.
  for (const bar of all("[data-filters]")) {
    const scope = document.getElementById(bar.dataset.filters);
    const [input, select, output] = ["input", "select", "output"].map((name) => bar.querySelector(name));
    const apply = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      const holds = (text) => words.every((word) => text.toLowerCase().includes(word));
      const state = select?.value ?? "";
      let shown = 0;
      const rows = all("tbody tr", scope);
      for (const row of rows) {
        const group = row.closest("details");
        const heading = group?.querySelector("summary")?.textContent ?? "";
        row.hidden = !holds(`${heading} ${row.textContent}`) || (state !== "" && row.dataset.state !== state);
        shown += !row.hidden;
      }
      const active = words.length > 0 || state !== "";
      for (const group of all("details", scope)) {
        const some = all("tbody tr", group).some((row) => !row.hidden);
        group.hidden = active && !some;
        if (active && some) group.open = true;
      }
      output.value = active ? `${shown} of ${rows.length} shown` : "";
    };
    input.addEventListener("input", apply);
    select?.addEventListener("change", apply);
  }

  // Copy: the clipboard where the browser gives it to a local file, else the old way.
  for (const button of all("button[data-copy]")) {
    const source = document.getElementById(button.dataset.copy);
    const said = button.nextElementSibling;
    button.addEventListener("click", async () => {
      let copied = false;
      try {
        await navigator.clipboard.writeText(source.textContent);
        copied = true;
      } catch {
        getSelection().selectAllChildren(source);
        copied = document.execCommand("copy");
      }
      said.value = copied ? "Copied" : "Selected: press Ctrl+C";
      setTimeout(() => (said.value = ""), 4000);
    });
  }

  // A link to something that is folded opens it; so does printing.
  const reveal = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let place = target; place; place = place.parentElement) if (place.localName === "details") place.open = true;
    target?.scrollIntoView?.();
  };
  addEventListener("hashchange", reveal);
  if (location.hash) reveal();
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = all("details:not([open])");
    closed.forEach((group) => (group.open = true));
  });
  addEventListener("afterprint", () => closed.forEach((group) => (group.open = false)));
})();
