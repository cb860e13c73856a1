"""The style sheet of the page, light and dark. Colours of runs keep their order: neighbours differ for all eyes."""

STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --ink: #0b0b0b; --soft: #52514e; --grid: #e1e0d9; --mark: #f6e3a8;
  --c0: #2a78d6; --c1: #eb6834; --c2: #1baf7a; --c3: #eda100; --c4: #e87ba4; --c5: #008300;
  --c6: #4a3aa7; --c7: #e34948; }
@media (prefers-color-scheme: dark) { :root { --paper: #1a1a19; --ink: #ffffff; --soft: #c3c2b7; --grid: #2c2c2a;
  --mark: #5c4a12; --c0: #3987e5; --c1: #d95926; --c2: #199e70; --c3: #c98500; --c4: #d55181; --c5: #008300;
  --c6: #9085e9; --c7: #e66767; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 1200px; padding: 1rem; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; } h3 { font-size: 1rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption, summary { font-weight: 600; } summary { cursor: pointer; margin-top: 1rem; }
figure svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--grid); } .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.dots circle { stroke: var(--paper); } .dots polyline { stroke-width: 1; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); } .c3 { stroke: var(--c3); }
.c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); } .c6 { stroke: var(--c6); } .c7 { stroke: var(--c7); }
.c0 circle { fill: var(--c0); } .c1 circle { fill: var(--c1); } .c2 circle { fill: var(--c2); }
.c3 circle { fill: var(--c3); } .c4 circle { fill: var(--c4); } .c5 circle { fill: var(--c5); }
.c6 circle { fill: var(--c6); } .c7 circle { fill: var(--c7); }
.d1 { stroke-dasharray: 6 3; } .d2 { stroke-dasharray: 2 3; } .d3 { stroke-dasharray: 8 3 2 3; }
.legend span { margin-right: 1.5rem; } .warning { border-left: 3px solid var(--c3); padding-left: .7rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--grid); padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top;
  white-space: pre-wrap; }
th, .none { color: var(--soft); font-weight: 500; } pre { overflow-x: auto; }
mark { background: var(--mark); color: inherit; }
"""
