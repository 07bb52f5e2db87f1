"use strict";

// On a phone the list of pages is longer than the screen is wide: show where one is.
document.querySelector("nav [aria-current]")?.scrollIntoView({block: "nearest", inline: "center"});

const number = text => text.trim() === "" ? NaN : Number(text.replaceAll(",", ""));
const compare = (a, b) => {
  const difference = number(a) - number(b);
  return Number.isNaN(difference) ? a.localeCompare(b, "en", {numeric: true}) : difference;
};

// A click on a column, or Enter, sorts by it.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => {
    const sort = () => {
      const up = head.ariaSort !== "ascending";
      heads.forEach(other => { other.ariaSort = "none"; });
      head.ariaSort = up ? "ascending" : "descending";
      const text = row => row.cells[i].textContent;
      body.append(...[...body.rows].sort((a, b) => compare(text(a), text(b)) * (up ? 1 : -1)));
    };
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
}

// Words leave the rows that hold all of them; "=bn" asks for a cell that is just that.
for (const filter of document.querySelectorAll(".filter")) {
  const field = filter.querySelector("input"), count = filter.querySelector("output");
  const rows = [...filter.nextElementSibling.querySelectorAll("tbody tr")].map(row => ({
    row, cells: [...row.cells].map(cell => cell.textContent.trim().toLowerCase()),
  }));
  const show = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(word => word);
    const holds = (cells, w) => w[0] === "=" ? cells.includes(w.slice(1)) : cells.some(c => c.includes(w));
    const fits = ({cells}) => words.every(w => holds(cells, w));
    for (const entry of rows) entry.row.hidden = !fits(entry);
    count.textContent = rows.filter(entry => !entry.row.hidden).length;
  };
  field.addEventListener("input", show);
  show();
}

// Paper has no folds.
addEventListener("beforeprint", () => { for (const fold of document.querySelectorAll("details")) fold.open = true; });
