"""The report's pages: Jinja templates, filled with autoescape on. They load nothing but the pictures beside them."""

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{{ heading }}</title>
<style>
:root {
  --ink: #1f2328; --faint: #626a73; --paper: #fff; --card: #f6f7f9; --line: #d9dde2;
  --comply: #00734f; --violate: #b84a00; --unparsed: #6d5aa8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e8eb; --faint: #9aa3ad; --paper: #15181c; --card: #1e2227; --line: #363c44;
    --comply: #4cc38a; --violate: #ff9b56; --unparsed: #b9a6f2;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1.1rem 4rem; max-width: 60rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.65rem; line-height: 1.25; margin: 0 0 .2rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .7rem; }
h3 { font-size: 1.02rem; margin: 0; }
p, ul { margin: .5rem 0; }
ul { padding-left: 1.2rem; }
.faint { color: var(--faint); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .8rem .4rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: normal; }
th:first-child, td:first-child { text-align: left; min-width: 8rem; }
thead th { color: var(--faint); font-weight: 600; }
tbody th { font-weight: 600; }
.ci { display: block; color: var(--faint); font-size: .82em; white-space: nowrap; }
.settings td { text-align: left; overflow-wrap: anywhere; min-width: 6rem; }
.settings th { text-align: left; font-weight: 400; color: var(--faint); }
img { display: block; width: 100%; height: auto; margin: 1.2rem 0 .4rem; border-radius: 6px; background: #fff;
  border: 1px solid var(--line); }
.episode { margin: 1rem 0; border: 1px solid var(--line); border-radius: 8px; background: var(--card); }
.episode > summary { padding: .8rem 1rem; cursor: pointer; }
.episode > summary h3 { display: inline; }
.episode > div { padding: 0 1rem 1rem; }
.strip { display: flex; flex-wrap: wrap; gap: .3rem; margin-top: .5rem; }
.pill { display: inline-block; padding: 0 .5rem; border-radius: 1rem; font-size: .78rem; font-weight: 600;
  border: 1px solid currentColor; white-space: nowrap; }
.comply { color: var(--comply); }
.violate { color: var(--violate); }
.unparsed { color: var(--unparsed); }
.round { border-top: 1px solid var(--line); padding-top: .7rem; margin-top: .9rem; }
.who { display: flex; flex-wrap: wrap; align-items: baseline; gap: .3rem .6rem; color: var(--faint);
  font-size: .8rem; margin: .6rem 0 .15rem; }
pre { margin: 0; padding: .55rem .7rem; border-radius: 6px; background: var(--paper); border: 1px solid var(--line);
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; max-height: 26rem; overflow-y: auto;
  font: .86rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre.comply, pre.violate, pre.unparsed { border-left: 4px solid currentColor; }
pre > span { color: var(--ink); }
details.again { font-size: .85rem; color: var(--faint); margin-top: .5rem; }
details.again pre { margin-top: .3rem; color: var(--ink); }
summary { cursor: pointer; }
code { font-size: .92em; }
a { color: inherit; }
</style>
</head>
<body>
{%- macro number(text, interval) -%}
{{ text }}{% if interval %}<span class="ci">{{ interval }}</span>{% endif %}
{%- endmacro %}
{%- macro settings(rows) -%}
<div class="scroll"><table class="settings"><tbody>
{%- for key, value in rows %}
<tr><th>{{ key }}</th><td>{{ value }}</td></tr>
{%- endfor %}
</tbody></table></div>
{%- endmacro %}
<h1>{{ heading }}</h1>
<p class="faint">model: {{ models }}</p>

<ul>
{%- for name, sentence in findings %}
<li><strong>{{ name }}</strong>: {{ sentence }}</li>
{%- endfor %}
</ul>
"""

_ROLE_PLAY = """
<a href="{{ picture }}"><img src="{{ picture }}" width="1600" height="900"
 alt="Violation rate by round, a line and a 95% band for each condition; the numbers are in the table below."></a>

<h2>Violation rate, in percent</h2>
<div class="scroll"><table>
<thead><tr><th>condition</th>
{%- for n in rounds %}<th>r{{ n }}</th>{% endfor -%}
<th>unparsed</th><th>change</th></tr></thead>
<tbody>
{%- for row in table %}
<tr><th>{{ row.name }}</th>
{%- for text, interval in row.cells %}<td>{{ number(text, interval) }}</td>{% endfor -%}
<td>{{ row.unparsed }}</td><td>{{ number(*row.change) }}</td></tr>
{%- endfor %}
</tbody></table></div>
<p class="faint">Below each number its 95% interval. Violations are counted among all answers; an answer that could not
be read counts as no violation and is shown under <em>unparsed</em>. Change: last round minus first, in percentage
points, paired by episode. The same as files: <a href="{{ rates_file }}">{{ rates_file }}</a>,
<a href="{{ changes_file }}">{{ changes_file }}</a>.</p>

<h2>How it moves</h2>
<div class="scroll"><table>
<thead><tr><th></th>{% for row in table %}<th>{{ row.name }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for label, cells in measures %}
<tr><th>{{ label }}</th>{% for text, interval in cells %}<td>{{ number(text, interval) }}</td>{% endfor %}</tr>
{%- endfor %}
</tbody></table></div>
<p class="faint">Onset: the first round whose change from the first round has an interval that leaves out 0. Hazard:
violations among episodes that had complied in every round before. Stickiness: how often a violation is followed by
another.</p>
{%- if probe %}

<h2>After a scripted history</h2>
<p>{{ probe.says }}</p>
<a href="{{ probe.picture }}"><img src="{{ probe.picture }}"
 alt="Scored rate of violations by the number of scripted rounds, a panel for each model, a line and a 95% band for each
 kind of history; the numbers are in the table below."></a>
<div class="scroll"><table>
<thead><tr><th>model</th><th>history</th><th>rounds</th><th>sampled</th><th>greedy</th><th>scored</th>
<th>unparsed</th></tr></thead>
<tbody>
{%- for row in probe.rows %}
<tr><th>{{ row.model }}</th><td>{{ row.history }}</td><td>{{ row.rounds }}</td>
{%- for text, interval in row.cells %}<td>{{ number(text, interval) }}</td>{% endfor -%}
<td>{{ row.unparsed }}</td></tr>
{%- endfor %}
</tbody></table></div>
<p class="faint">Sampled as in the run; greedy: the likeliest answer; scored: the probability of violating, against that
of complying, where the sampled answer names its choice. Intervals as above, scenarios resampled. {{ probe.told }}</p>
{%- endif %}

<h2>Whole episodes</h2>
<p class="faint">Not picked by hand: of each kind the first in the order of the scenarios, with how many there are.</p>
{%- for episode in episodes %}
<details class="episode"{% if loop.first %} open{% endif %}>
<summary><h3>{{ episode.label }}</h3> <span class="faint">{{ episode.where }}</span>
<div class="strip">
{%- for round in episode.rounds %}<span class="pill {{ round.decision }}">{{ round.number }} {{ round.decision }}</span>
{% endfor -%}
</div></summary>
<div>
<p class="faint">{{ episode.count }}</p>
{%- for round in episode.rounds %}
<div class="round"><h3>Round {{ round.number }}</h3>
{%- for message in round.messages %}
{%- if message.first %}
<details class="again"><summary>{{ message.role }}: the same words as in round {{ message.first }}</summary>
<pre>{{ "\\n" }}{{ message.content }}</pre></details>
{%- else %}
<div class="who">{{ message.role }}</div>
<pre>{{ "\\n" }}{{ message.content }}</pre>
{%- endif %}
{%- endfor %}
<div class="who">answer <span class="pill {{ round.decision }}">{{ round.decision }}</span> {{ round.outcome }}</div>
<pre class="{{ round.decision }}">{{ "\\n" }}<span>{{ round.answer }}</span></pre>
</div>
{%- endfor %}
<details class="again"><summary>Everything the agent saw in the last round</summary>
{%- for message in episode.prompt %}
<div class="who">{{ message.role }}</div>
<pre>{{ "\\n" }}{{ message.content }}</pre>
{%- endfor %}
</details>
</div>
</details>
{%- endfor %}
"""

_TABLES = """
{%- for picture in pictures %}
<a href="{{ picture.file }}"><img src="{{ picture.file }}" alt="{{ picture.says }}"></a>
<p class="faint">{{ picture.says }}</p>
{%- endfor %}
{%- for table in tables %}
<h2>{{ table.heading }}</h2>
<div class="scroll"><table>
<thead><tr>{% for head in table.head %}<th>{{ head }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for name, cells in table.rows %}
<tr><th>{{ name }}</th>{% for text, interval in cells %}<td>{{ number(text, interval) }}</td>{% endfor %}</tr>
{%- endfor %}
</tbody></table></div>
{%- for text in table.texts %}
<p class="faint">{{ text }}</p>
{%- endfor %}
{% endfor %}
<p class="faint">The same as files, and more: {% for file in files -%}
<a href="{{ file }}">{{ file }}</a>{{ ", " if not loop.last }}{% endfor %}.</p>
"""

_FOOT = """
<h2>What was run</h2>
{{ settings(main_settings) }}
{%- if other_settings %}
<details><summary>All settings</summary>
{{ settings(other_settings) }}
</details>
{%- endif %}

<h2>How the intervals are made, and what they do not say</h2>
{%- for paragraph in notes %}
<p>{{ paragraph }}</p>
{%- endfor %}
</body>
</html>
"""

PAGE = _HEAD + _ROLE_PLAY + _FOOT
TABLES_PAGE = _HEAD + _TABLES + _FOOT
