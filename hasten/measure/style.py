"""The look of a report: one style sheet, light and dark, from wide screens down to 400 pixels."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --paper: #ffffff; --ink: #14181f; --muted: #606b7b; --line: #e3e7ed;
  --soft: #e9edf3; --accent: #2f5bea; --good: #0b7a4b; --warn: #a35b00; --bad: #c0272d;
  --odd: #7a3fb5; --series-1: #2f5bea; --series-2: #c8501b; --series-3: #0b7f63; --series-4: #8a3fc0;
  --series-5: #a97800; --series-6: #c22a72; --series-7: #0b7c9e; --shadow: 0 1px 2px rgba(20, 24, 31, .05), 0 8px 24px rgba(20, 24, 31, .05);
  --sans: ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
    "Noto Sans", "DejaVu Sans", sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0e1116; --paper: #161b22; --ink: #e9edf3; --muted: #98a3b3; --line: #29313c;
    --soft: #262e39; --accent: #86a5ff; --good: #4cc38a; --warn: #e0a458; --bad: #ff7b72;
    --odd: #c297ff; --series-1: #86a5ff; --series-2: #ff9c66; --series-3: #4fd0a8; --series-4: #cf9bff;
    --series-5: #e3b84a; --series-6: #ff86b9; --series-7: #5cc8e8; --shadow: none;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 var(--sans);
  font-variant-numeric: tabular-nums;
}
main { max-width: 1120px; margin: 0 auto; padding: 48px 32px 72px; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -.022em; margin: 6px 0 12px;
  overflow-wrap: anywhere; }
h2 { font-size: 20px; letter-spacing: -.012em; margin: 0 0 4px; }
p { margin: 0; }
.eyebrow { color: var(--accent); font-weight: 600; font-size: 13px; letter-spacing: .02em; }
.lead { font-size: 18px; line-height: 1.5; max-width: 46em; color: var(--ink); }
.note { color: var(--muted); font-size: 14px; max-width: 62em; }
.warning {
  border-left: 3px solid var(--warn); background: var(--soft); border-radius: 0 8px 8px 0;
  padding: 10px 16px; margin-top: 20px;
}
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; margin: 30px 0 8px; }
.tile {
  background: var(--paper); border-radius: 14px; padding: 16px 18px; box-shadow: var(--shadow);
  border: 1px solid var(--line);
}
.tile b { display: block; font-size: 27px; line-height: 1.2; letter-spacing: -.02em; }
.tile span { color: var(--muted); font-size: 13px; display: block; overflow-wrap: anywhere; }
section {
  background: var(--paper); border: 1px solid var(--line); border-radius: 16px;
  box-shadow: var(--shadow); padding: 24px 26px 22px; margin-top: 22px;
}
section > .note { margin-bottom: 16px; }
.plot svg { display: block; width: 100%; height: auto; overflow: visible; }
.plot.narrow { display: none; }
svg text { font-family: var(--sans) !important; }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--muted); font-size: 13px;
  vertical-align: bottom; padding: 0 10px 9px; border-bottom: 1px solid var(--line); }
td { padding: 11px 10px; vertical-align: top; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
.n { text-align: right; white-space: nowrap; }
.sub { display: block; color: var(--muted); font-size: 12.5px; font-weight: 400;
  white-space: normal; }
td.whole { min-width: 170px; }
th.n { white-space: normal; }
.n .sub { white-space: nowrap; }
.n + td:not(.n) { padding-left: 22px; } .n + th:not(.n) { padding-left: 22px; }
.plan { font-weight: 600; overflow-wrap: anywhere; }
.pill {
  display: inline-block; font-size: 11px; line-height: 1; padding: 3px 6px 4px; font-weight: 500;
  border-radius: 5px; border: 1px solid var(--line); color: var(--muted); white-space: nowrap;
}
th .pill { margin-top: 4px; }
.chip { font-weight: 600; white-space: nowrap; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
.odd { color: var(--odd); } .muted { color: var(--muted); }
.legend { color: var(--muted); font-size: 13px; margin-top: 10px; }
.legend i { display: inline-block; width: 9px; height: 9px; border-radius: 50%;
  margin: 0 5px 0 14px; }
.legend i:first-child { margin-left: 0; }
dl { display: grid; grid-template-columns: 220px 1fr; gap: 7px 18px; margin: 14px 0 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: 13px/1.5 var(--mono); background: var(--soft); padding: 2px 6px; border-radius: 5px;
  overflow-wrap: anywhere; }
footer { color: var(--muted); font-size: 13px; margin-top: 26px; max-width: 62em; }
.counters { display: flex; flex-wrap: wrap; gap: 4px 20px; }
.counters span { white-space: nowrap; }
@media (max-width: 900px) {
  main { padding: 32px 18px 56px; }
  .tiles { grid-template-columns: 1fr 1fr; }
}
@media (max-width: 760px) {
  h1 { font-size: 27px; } .lead { font-size: 16.5px; }
  section { padding: 20px 16px 16px; border-radius: 13px; }
  .tile { padding: 13px 14px; } .tile b { font-size: 22px; }
  .tiles { gap: 10px; }
  .plot.wide { display: none; } .plot.narrow { display: block; max-width: 440px; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 10px; }
  table, tbody, tr, td { display: block; width: 100%; }
  thead { display: none; }
  tr { padding: 12px 0; border-bottom: 1px solid var(--line); }
  tbody tr:last-child { border-bottom: 0; padding-bottom: 0; }
  td, td:first-child, td:last-child {
    border: 0; padding: 3px 0 !important; display: flex; justify-content: space-between; gap: 16px;
    text-align: right;
  }
  td::before { content: attr(data-label); color: var(--muted); text-align: left;
    flex: 0 0 auto; max-width: 58%; }
  td.none { display: none !important; }
  td.whole { display: block; min-width: 0; text-align: left; padding-bottom: 6px; }
  td.whole::before { content: none; }
  .n { white-space: normal; }
  .counters { justify-content: flex-end; }
}
.samples { display: grid; grid-template-columns: 178px repeat(var(--columns), max-content);
  gap: 8px 8px; overflow-x: auto; padding-bottom: 6px; align-items: center; }
.samples .who { position: sticky; left: 0; background: var(--paper); padding-right: 10px;
  align-self: stretch; display: flex; flex-direction: column; justify-content: center; }
.samples .who b { font-size: 13px; overflow-wrap: anywhere; }
.samples .who span { color: var(--muted); font-size: 12.5px; }
.samples img { display: block; border-radius: 6px; image-rendering: pixelated; }
.samples .caption { color: var(--muted); font-size: 12px; line-height: 1.35; max-width: 100%;
  width: 0; min-width: 100%; align-self: end; }
@media (max-width: 760px) {
  .samples { grid-template-columns: repeat(var(--columns), max-content); }
  .samples .who { grid-column: 1 / -1; padding: 6px 0 0; max-width: calc(100vw - 72px); }
  .samples .who:empty { display: none; }
}
@media print {
  body { background: none; } section, .tile { box-shadow: none; break-inside: avoid; }
}
"""
