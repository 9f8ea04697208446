"""The files of deploy/prometheus and deploy/grafana.

check DIRECTORY      the dashboards, rules and tests fit together, and fit the documents
query DIRECTORY URL  every expression returns data from this Prometheus, without its comparisons

DIRECTORY is the root of the project. The exit code is 1 if there are findings, one a line.
"""

import json
import math
import pathlib
import re
import sys
import time
import urllib.parse
import urllib.request

import yaml

# The first results of all rules need a few seconds; a busy machine needs more.
DEADLINE_S = 120
POLL_S = 1
CALL_S = 30
# Of the grid of Grafana.
COLUMNS = 24
SEVERITIES = {"page", "ticket"}
ANNOTATIONS = {"summary", "description", "runbook"}
METRIC = re.compile(r"(?<![:\w])(?:infra|function|http|process)_\w+(?![:\w])")
RECORDED = re.compile(r"\b[a-zA-Z_]+(?::\w+)+")
# A comparison with a number or a product of numbers. Those of labels are followed by a quote.
COMPARISON = re.compile(r"\s*(?:==|!=|>=|<=|>|<)\s*(?:\([\d.*\s-]+\)|-?[\d.]+(?:\s*\*\s*[\d.]+)*)")
# What Grafana replaces: variables of dashboards, and ranges.
VARIABLE = re.compile(r"\$\{?(\w+)\}?")
RANGES = {"__rate_interval": "5m", "__range": "5m", "__interval": "5m"}
LABEL_VALUES = re.compile(r"label_values\((.+),\s*\w+\)")


class Files:
    def __init__(self, root):
        self.root = pathlib.Path(root)
        prometheus = self.root / "deploy/prometheus"
        self.config = self.yaml(prometheus / "prometheus.yml")
        self.rules = {path: self.yaml(path) for path in sorted(prometheus.glob("rules/*.yml"))}
        self.tests = {path: self.yaml(path) for path in sorted(prometheus.glob("tests/*.yml"))}
        paths = sorted((self.root / "deploy/grafana").glob("*.json"))
        self.dashboards = {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}

    def yaml(self, path):
        return yaml.safe_load(path.read_text(encoding="utf-8"))

    def text(self, name):
        return (self.root / name).read_text(encoding="utf-8")

    def all_rules(self):
        return [rule for file in self.rules.values() for group in file["groups"] for rule in group["rules"]]

    def alerts(self):
        return [rule for rule in self.all_rules() if "alert" in rule]

    def panels(self, dashboard):
        for panel in dashboard["panels"]:
            yield panel
            yield from panel.get("panels", [])

    def expressions(self):
        """(where, expression) of every rule, panel and variable."""
        for rule in self.all_rules():
            yield rule.get("alert") or rule["record"], rule["expr"]
        for path, dashboard in self.dashboards.items():
            for panel in self.panels(dashboard):
                for target in panel.get("targets", []):
                    yield f"{path.name}: {panel['title']}, {target['refId']}", target["expr"]
            for variable in dashboard["templating"]["list"]:
                if variable["type"] == "query":
                    query = LABEL_VALUES.fullmatch(variable["query"]["query"])
                    yield f"{path.name}: ${variable['name']}", query.group(1)


def documented_metrics(files):
    rows = re.findall(r"^\| `(\w+)` \| (counter|gauge|histogram) \|", files.text("docs/metrics.md"), re.M)
    names = {name for name, _ in rows}
    histograms = [name for name, kind in rows if kind == "histogram"]
    return names | {name + part for name in histograms for part in ("_bucket", "_sum", "_count")}


def check_alerts(files):
    headings = set(re.findall(r"^#+ (\w+)$", files.text("docs/operations.md"), re.M))
    anchors = {heading.lower() for heading in headings}
    named = set()
    fires, stays = set(), set()
    for test in (test for file in files.tests.values() for test in file["tests"]):
        for case in test["alert_rule_test"]:
            (fires if case["exp_alerts"] else stays).add(case["alertname"])
    names = [rule["alert"] for rule in files.alerts()]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{name} is the name of two alerts"
    for rule in files.alerts():
        name, annotations = rule["alert"], rule.get("annotations", {})
        if rule.get("labels", {}).get("severity") not in SEVERITIES:
            yield f"{name} has no severity of {sorted(SEVERITIES)}"
        if set(annotations) != ANNOTATIONS:
            yield f"{name} has the annotations {sorted(annotations)}"
        document, _, anchor = annotations.get("runbook", "").partition("#")
        named.add(anchor)
        if document != "docs/operations.md" or anchor not in anchors:
            yield f"{name}: docs/operations.md has no section #{anchor}"
        if name not in fires or name not in stays:
            yield f"{name} needs a test in which it fires, and one in which it does not"
    for name in sorted((fires | stays) - set(names)):
        yield f"{name} has tests and does not exist"
    for heading in sorted(headings):
        if heading.startswith("Infra") and heading.lower() not in named:
            yield f"docs/operations.md: no alert names the section {heading}"


def check_rules(files):
    known = documented_metrics(files)
    recorded = {rule["record"] for rule in files.all_rules() if "record" in rule}
    for where, expression in files.expressions():
        # Values of labels may look like metrics.
        bare = re.sub(r'"[^"]*"', '""', expression)
        for name in METRIC.findall(re.sub(r"\b(?:by|without|on)\s*\([^)]*\)", "", bare)):
            if name not in known:
                yield f"{where}: docs/metrics.md has no metric {name}"
        for name in RECORDED.findall(bare):
            if name not in recorded:
                yield f"{where}: no rule records {name}"
    listed = {path.split("/")[-1] for path in files.config["rule_files"]}
    for path in files.rules:
        if path.name not in listed:
            yield f"prometheus.yml does not name {path.name}"


def check_dashboards(files):
    uids = [dashboard["uid"] for dashboard in files.dashboards.values()]
    if len(set(uids)) < len(uids) or len(uids) < 4:
        yield f"four dashboards with uids of their own are expected: {uids}"
    for path, dashboard in files.dashboards.items():
        if path.read_text(encoding="utf-8") != json.dumps(dashboard, indent=2, ensure_ascii=False) + "\n":
            yield f"{path.name} is not formatted: two spaces, one member a line"
        variables = {variable["name"]: variable["type"] for variable in dashboard["templating"]["list"]}
        if variables.get("datasource") != "datasource" or "node" not in variables:
            yield f"{path.name} has no variables datasource and node: {sorted(variables)}"
        panels = list(files.panels(dashboard))
        ids = [panel["id"] for panel in panels]
        if len(set(ids)) < len(ids):
            yield f"{path.name}: two panels have one id"
        places = set()
        for panel in panels:
            yield from check_panel(f"{path.name}: {panel['title']}", panel, variables, places)


def check_panel(where, panel, variables, places):
    place = panel["gridPos"]
    right, bottom = place["x"] + place["w"], place["y"] + place["h"]
    cells = {(x, y) for x in range(place["x"], right) for y in range(place["y"], bottom)}
    if cells & places or right > COLUMNS:
        yield f"{where}: overlaps another panel, or is outside of the grid"
    places |= cells
    if panel["type"] == "row":
        return
    if not panel.get("description"):
        yield f"{where}: has no description"
    if not panel.get("targets"):
        yield f"{where}: has no expression"
    defaults = panel["fieldConfig"]["defaults"]
    if panel["type"] not in ("state-timeline", "heatmap") and not defaults.get("unit"):
        yield f"{where}: has no unit"
    for target in panel["targets"]:
        if panel["datasource"]["uid"] != "${datasource}" or target["datasource"]["uid"] != "${datasource}":
            yield f"{where}: does not use the variable datasource"
        for name in VARIABLE.findall(target["expr"]):
            if name not in variables and name not in RANGES:
                yield f"{where}: ${name} is not defined"


def plain(expression):
    """Without comparisons and variables, which would select single values."""
    stripped = COMPARISON.sub("", expression)
    regexes = re.sub(r'=~?"\$\{?(?!__)\w+\}?"', '=~".*"', stripped)
    return VARIABLE.sub(lambda variable: RANGES[variable.group(1)], regexes)


def call(url, path, parameters):
    body = urllib.parse.urlencode(parameters).encode()
    try:
        with urllib.request.urlopen(f"{url}/api/v1/{path}", body or None, timeout=CALL_S) as answer:
            return json.load(answer)["data"]
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{path} {parameters}: {error.read().decode()}") from error


def has_data(url, expression):
    result = call(url, "query", {"query": expression})["result"]
    return any(math.isfinite(float(sample["value"][1])) for sample in result)


def query(files, url):
    left = {where: plain(expression) for where, expression in files.expressions()}
    for where, expression in left.items():
        if "$" in expression:
            yield f"{where}: a variable is left in {expression}"
    total, end = len(left), time.monotonic() + DEADLINE_S
    while left and time.monotonic() < end:
        left = {where: expression for where, expression in left.items() if not has_data(url, expression)}
        time.sleep(POLL_S if left else 0)
    for where, expression in left.items():
        yield f"{where}: no data for {' '.join(expression.split())}"
    for group in call(url, "rules", {})["groups"]:
        for rule in group["rules"]:
            if rule["health"] != "ok":
                yield f"{rule['name']}: {rule.get('lastError')}"
    print(f"{total} expressions")


def main():
    files = Files(sys.argv[2])
    if sys.argv[1] == "check":
        findings = [*check_alerts(files), *check_rules(files), *check_dashboards(files)]
    else:
        findings = list(query(files, sys.argv[3]))
    print("\n".join(findings))
    sys.exit(1 if findings else 0)


main()
