"""Grafana's dashboard: every metric and label of its queries is one that a server exposes."""

import json
import re
from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families
from support.documents import ROOT
from support.serving import Server

_METRIC = re.compile(r"((?:vllm:|loraexport_)\w+)(?:\{(\w+)=~\"\$model\"\})?")
_SUFFIXES = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"], "gauge": [""]}


def test_every_metric_of_the_dashboard_is_exposed(server: Server) -> None:
    """Of a decoder's, which have no samples here, the label of the model is held to the prefix."""
    server.post("/v1/embeddings", model="sql", input="hello")
    exposed = defaultdict[str, set[str]](set)
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for suffix in _SUFFIXES[family.type]:
            exposed[family.name + suffix] = set()
        for sample in family.samples:
            exposed[sample.name] |= sample.labels.keys()
    dashboard = json.loads((ROOT / "examples/serve/deploy/grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(queries) > 20
    for query in queries:
        assert query.count("(") == query.count(")"), query
        names = _METRIC.findall(query)
        assert names, query
        by = {
            label.strip()
            for part in re.findall(r"by \(([^)]*)\)", query)
            for label in part.split(",")
        }
        for name, matched in names:
            assert name in exposed, name
            labels = by | ({matched} if matched else set())
            assert labels & {"model", "model_name"} <= {_model_label(name)}, query
            assert not exposed[name] or labels <= exposed[name], query
    (variable,) = (one for one in dashboard["templating"]["list"] if one["type"] == "query")
    ((metric, label),) = re.findall(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
    assert label in exposed[metric]


def _model_label(name: str) -> str:
    return "model_name" if name.startswith("vllm:") else "model"
