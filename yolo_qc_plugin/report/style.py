# yolo_qc_plugin, AGPL-3.0
"""How a page looks: light and dark as the reader's system has it, from 400 to 1,600 pixels wide."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #1c2128; --soft: #5b6572; --line: #dfe3e8; --good: #00704e;
  --c0: #0072b2; --c1: #c44f00; --c2: #00805a; --c3: #b0558a; --c4: #b97900; --c5: #2f8fc4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0e1116; --card: #171b22; --text: #e4e8ee; --soft: #9aa5b3; --line: #2b323c; --good: #43c59e;
    --c0: #4aa8e0; --c1: #f08a4b; --c2: #2fc296; --c3: #dd92be; --c4: #f0b440; --c5: #86ccf2;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.55 system-ui, sans-serif; }
main, header { max-width: 1120px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 28px; padding-bottom: 4px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 6px; }
h3 { font-size: .95rem; margin: 18px 0 2px; }
p { margin: 4px 0 10px; max-width: 75ch; }
.soft, figcaption { color: var(--soft); }
section, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
section { padding: 18px 20px; margin: 16px 0; }
nav { display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 10px 0 0; font-size: .9rem; }
nav a { color: var(--c0); text-decoration: none; }
nav a:hover { text-decoration: underline; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin: 14px 0 0; }
.tile { padding: 12px 16px; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .88rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.kept td { font-weight: 650; color: var(--good); }
figure { margin: 10px 0 4px; }
figcaption { font-size: .88rem; max-width: 85ch; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { fill: currentColor; }
.layers svg { min-width: 880px; }
.plain svg { min-width: 620px; max-width: 920px; }
.small svg { max-width: 640px; min-width: 420px; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); gap: 14px 20px; }
.pairs img { display: block; width: 100%; height: auto; border-radius: 4px; background: #fff; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .3em 0 .8em; }
pre { overflow-x: auto; background: var(--page); border: 1px solid var(--line); border-radius: 6px; padding: 10px 12px;
  font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0; }
summary { cursor: pointer; color: var(--c0); margin: 8px 0; }
footer { color: var(--soft); font-size: .85rem; max-width: 1120px; margin: 0 auto; padding: 4px 16px 32px; }
"""
