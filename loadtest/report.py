"""The report: report.md, report.html with plots, and report.json with all figures."""

import html
import json
import statistics

from cases import ASYNC, BARE_8, BARE_13, BARE_NOW, CONNECTIONS, HALF, ORDER, SYNC

COLOURS = {
    ASYNC: "#1f6f8b",
    HALF: "#5a9bb3",
    SYNC: "#7a4b94",
    BARE_NOW: "#b9bec4",
    BARE_8: "#8d949b",
    BARE_13: "#6b7279",
}

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #667; --line: #d8dce0; --back: #fff; }
:root { --good: #2b7a3d; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #9aa3ab; --line: #3a4147; --back: #15191d;
    --good: #6cc17e; --bad: #ff8a80; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); }
body { max-width: 980px; margin: 3em auto; padding: 0 1.2em; }
h1 { font-size: 1.6em; margin: 0 0 .2em; } h2 { font-size: 1.1em; margin: 2.4em 0 .6em; }
p.about { color: var(--soft); margin: .2em 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35em .6em; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
table.wide { font-size: .86em; }
.met { color: var(--good); } .missed { color: var(--bad); font-weight: 700; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; } svg .soft { fill: var(--soft); }
"""


def medians(runs, case, key):
    return statistics.median(run[case][key] for run in runs) if key in runs[0][case] else None


def shown(value, unit=""):
    if value is None:
        return "–"
    text = (
        f"{value:,.0f}"
        if value == int(value) or abs(value) >= 100
        else f"{value:.2f}"
        if abs(value) < 10
        else f"{value:.1f}"
    )
    return f"{text} {unit}".strip()


def table(runs):
    """Header and rows of the table of cases, with the medians of all rounds."""
    header = [
        "case",
        "connections",
        "requests/s",
        "CPU µs a request",
        "p50 ms",
        "p99 ms",
        "failed",
        "AWS calls a request",
        "Redis commands a request",
        "jobs a batch",
        "memory MB",
    ]
    keys = ["rps", "cpu_us", "p50_ms", "p99_ms"]
    rows = []
    for case in ORDER:
        failed = sum(run[case]["failed"] for run in runs)
        rest = [medians(runs, case, key) for key in ("aws_calls", "redis_commands", "mean_batch", "peak_mb")]
        numbers = [medians(runs, case, key) for key in keys]
        rows.append([case, shown(CONNECTIONS[case]), *map(shown, numbers), shown(failed), *map(shown, rest)])
    return header, rows


def target_rows(targets):
    for what, measured, bound, unit in targets:
        yield what, shown(measured, unit), f"≤ {shown(bound, unit)}", measured <= bound


def markdown(about, runs, targets, extra):
    lines = [
        f"`{about['command']}`, {about['date']}, commit {about['commit']}, "
        f"on {about['machine']}; {about['setting']}.",
        "",
    ]
    header, rows = table(runs)
    for row in [header, ["---"] + ["---:"] * (len(header) - 1), *rows]:
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", "| target | measured | bound | |", "|---|---:|---:|---|"]
    for what, measured, bound, is_met in target_rows(targets):
        lines.append(f"| {what} | {measured} | {bound} | {'met' if is_met else '**NOT MET**'} |")
    lines += [f"| {what} | {shown(ratio, '×')} | no bound | |" for what, ratio in extra.items()]
    return "\n".join(lines) + "\n"


def dots(runs, key, unit, bounds=()):
    """One line a case: a dot for each round, and a bar for the median."""
    width, left, right, line = 820, 170, 70, 34
    most = max(run[case][key] for run in runs for case in ORDER) * 1.05
    x = lambda value: left + (width - left - right) * value / most
    parts = []
    for n, case in enumerate(ORDER):
        y = 20 + n * line
        median = medians(runs, case, key)
        parts.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{case}</text>')
        parts.append(
            f'<rect x="{left}" y="{y - 8}" width="{x(median) - left:.1f}" height="16" rx="2" '
            f'fill="{COLOURS[case]}" opacity=".55"/>'
        )
        parts += [
            f'<circle cx="{x(run[case][key]):.1f}" cy="{y}" r="3.2" fill="{COLOURS[case]}"/>' for run in runs
        ]
        far = max(run[case][key] for run in runs)
        parts.append(f'<text x="{x(far) + 9:.1f}" y="{y + 4}">{shown(median, unit)}</text>')
        for of, factor in bounds:
            if of == case:
                at = x(factor)
                parts.append(
                    f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y - 13}" y2="{y + 13}" '
                    f'stroke="var(--bad)" stroke-dasharray="3 2"/>'
                )
    return f'<svg viewBox="0 0 {width} {20 + line * len(ORDER)}" role="img">{"".join(parts)}</svg>'


def memory_plot(samples):
    width, height, left, bottom = 820, 190, 60, 30
    if not samples:
        return ""
    end, most = samples[-1][0], max(mb for _, mb in samples) * 1.1
    x = lambda s: left + (width - left - 10) * s / end
    y = lambda mb: height - bottom - (height - bottom - 10) * mb / most
    path = " ".join(f"{x(s):.1f},{y(mb):.1f}" for s, mb in samples)
    parts = [f'<polyline points="{path}" fill="none" stroke="{COLOURS[ASYNC]}" stroke-width="1.6"/>']
    for mb in (0, most / 2.2, most / 1.1):
        parts.append(
            f'<line x1="{left}" x2="{width - 10}" y1="{y(mb):.1f}" y2="{y(mb):.1f}" stroke="var(--line)"/>'
        )
        parts.append(
            f'<text class="soft" x="{left - 8}" y="{y(mb) + 4:.1f}" text-anchor="end">{mb:.0f} MB</text>'
        )
    for s in range(0, int(end), max(30, int(end) // 6 // 30 * 30)):
        parts.append(f'<text class="soft" x="{x(s):.1f}" y="{height - 8}" text-anchor="middle">{s} s</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def html_table(header, rows, kind=""):
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{kind}"><tr>{head}</tr>{body}</table>'


def page(about, results, targets, extra):
    runs = results["rounds"]
    header, rows = table(runs)
    verdicts = [
        [
            html.escape(what),
            measured,
            bound,
            '<span class="met">met</span>' if is_met else '<span class="missed">not met</span>',
        ]
        for what, measured, bound, is_met in target_rows(targets)
    ]
    verdicts += [[html.escape(what), shown(ratio, "×"), "no bound", ""] for what, ratio in extra.items()]
    bounds = [(ASYNC, 2.5 * medians(runs, BARE_8, "cpu_us")), (SYNC, 3.0 * medians(runs, BARE_13, "cpu_us"))]
    sections = [
        ("Targets", html_table(["", "measured", "bound", ""], verdicts)),
        (
            "CPU µs a request, of the server process",
            dots(runs, "cpu_us", "µs", bounds)
            + "<p class='about'>A dot is a round, the bar is the median, the dashed line is the bound.</p>",
        ),
        ("Time to the answer, median", dots(runs, "p50_ms", "ms")),
        ("Time to the answer, 99th percentile", dots(runs, "p99_ms", "ms")),
        ("All cases, medians of the rounds", html_table(header, rows, "wide")),
        ("Resident memory of the gateway over the whole test", memory_plot(results["memory"])),
    ]
    about_lines = "".join(
        f'<p class="about">{html.escape(about[key])}</p>' for key in ("machine", "setting", "command")
    )
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections)
    title = f"Infra Controller, load test of {about['date']}, {about['commit']}"
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}<h1>{title}</h1>{about_lines}{body}</html>'


def write(directory, about, results, targets, extra):
    directory.mkdir(exist_ok=True)
    text = markdown(about, results["rounds"], targets, extra)
    (directory / "report.md").write_text(text)
    (directory / "report.html").write_text(page(about, results, targets, extra))
    (directory / "report.json").write_text(
        json.dumps({"about": about, "results": results, "targets": targets, "extra": extra}, indent=1)
    )
    print("\n" + text)
    print(f"written: {directory}/report.html, report.md, report.json")
