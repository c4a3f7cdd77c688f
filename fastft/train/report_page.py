"""The page of the demo's report. ``{{name}}`` is where ``render_html`` puts a value."""

from __future__ import annotations

__all__ = ["PAGE"]

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastft demo</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; color: #1d2129; background: #fff;
         max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
  h1 { margin-bottom: .2rem; }
  h2 { margin: 2.2rem 0 .6rem; border-bottom: 1px solid #e3e6ea; padding-bottom: .2rem; }
  h3 { margin: 1rem 0 .3rem; font-size: 1rem; }
  .headline { font-size: 1.15rem; }
  .charts { display: grid; gap: 1rem;
            grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }
  figure { margin: 0; }
  figure img { width: 100%; height: auto; }
  figcaption { color: #5b616b; font-size: .9rem; }
  .wide { overflow-x: auto; }
  table { border-collapse: collapse; }
  th, td { padding: .3rem .9rem; border-bottom: 1px solid #e3e6ea; text-align: right;
           font-variant-numeric: tabular-nums; }
  th:first-child { text-align: left; font-weight: 500; }
  .facts td { text-align: left; }
  .facts th { vertical-align: top; white-space: nowrap; }
  pre { background: #f5f6f8; padding: .7rem 1rem; border-radius: 6px; overflow-x: auto;
        white-space: pre-wrap; font-size: .88rem; }
</style>
</head>
<body>
<h1>fastft beside plain PEFT</h1>
<p class="headline">{{headline}}</p>
<div class="wide"><table>
{{figures}}
</table></div>

<h2>Curves</h2>
<div class="charts">
<figure><img alt="training loss by step" src="{{chart_loss}}">
<figcaption>Training loss. fastft is the thin line; where it covers the wide one, they
agree.</figcaption></figure>
<figure><img alt="tokens per second by step" src="{{chart_speed}}">
<figcaption>Throughput: {{tokens}} tokens a step, padding included, through forward, backward and
update. The first {{skipped}} steps (shaded) are left out of the medians, {{speed_peft}} and
{{speed_fastft}} tokens/s.</figcaption></figure>
<figure><img alt="peak extra memory" src="{{chart_memory}}">
<figcaption>Peak extra memory: {{memory_how}}.</figcaption></figure>
</div>

<h2>One held-out example</h2>
<p>Neither side saw it in training; it is one of the {{examples}} that the held-out loss is the
mean of. Answers are greedy and cut at a fixed length; "after" is fastft's adapter.</p>
{{sample}}

<h2>What was fused</h2>
<p>{{fused}}</p>

<h2>How it was measured</h2>
<div class="wide"><table class="facts">
{{facts}}
</table></div>
<h3>Command</h3>
<pre>{{command}}</pre>
</body>
</html>
"""
