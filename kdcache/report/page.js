"use strict";
// A click on a header sorts its table by that column, best numbers or first names on top; a second click turns the order
// round. Missing values stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  const key = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value ?? cell.textContent.trim();
  };
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const rows = [...table.tBodies[0].rows];
      const numeric = rows.every((row) => key(row, column) === "" || !isNaN(key(row, column)));
      const sorted = header.getAttribute("aria-sort");
      const sign = sorted ? (sorted === "descending" ? 1 : -1) : numeric ? -1 : 1;
      rows.sort((a, b) => {
        const [x, y] = [key(a, column), key(b, column)];
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (numeric ? x - y : x.localeCompare(y, undefined, { numeric: true }));
      });
      table.tBodies[0].append(...rows);
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    });
  });
}
