"""Rank documents by a server that runs, as Jina's and Cohere's clients ask.

    loraexport-serve artifacts/minilm --port 8000
    python examples/serve/rerank.py http://127.0.0.1:8000 --model pydoc

Of a cross-encoder the score is its own; of a model of vectors, such as this one, their cosine.
"""

import argparse
import json
import urllib.request

QUERY = "reads a file line by line"
DOCUMENTS = [
    "for line in stream: yield line.rstrip()",
    "return math.sqrt(x * x + y * y)",
    "with open(path) as opened: return opened.read()",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--model", default=None, help="an adapter; default: the base")
    parser.add_argument("--key", default=None, help="where the server has keys")
    args = parser.parse_args()
    body = {"query": QUERY, "documents": DOCUMENTS, "top_n": 3}
    if args.model:
        body["model"] = args.model
    headers = {"content-type": "application/json"}
    if args.key:
        headers["authorization"] = f"Bearer {args.key}"
    request = urllib.request.Request(f"{args.url}/v1/rerank", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        ranking = json.load(answer)
    for one in ranking["results"]:
        print(f"{one['relevance_score']:6.3f}  {one['document']['text']}")


if __name__ == "__main__":
    main()
