"""Ask every model of a server the same at once, and read the answers as they come.

    loraexport-serve artifacts/smollm2 --port 8000
    python examples/serve/chat.py http://localhost:8000 "What is the capital of France?"

Needs OpenAI's client (`pip install openai`). The base and all adapters answer in the same batch,
each with its own weights.
"""

import argparse
import asyncio

import openai


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="of the server")
    parser.add_argument("question")
    parser.add_argument("--key", default="none", help="of a server with keys")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    asyncio.run(ask_all(args))


async def ask_all(args: argparse.Namespace) -> None:
    """Print each answer as soon as it has ended."""
    async with openai.AsyncOpenAI(base_url=f"{args.url}/v1", api_key=args.key) as client:
        models = [card.id async for card in client.models.list()]
        asks = [ask(client, model, args.question, args.max_tokens) for model in models]
        for answer in asyncio.as_completed(asks):
            print(*await answer, sep=": ")


async def ask(
    client: openai.AsyncOpenAI, model: str, question: str, max_tokens: int
) -> tuple[str, str]:
    """A model, and what it answers."""
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=max_tokens,
        stream=True,
    )
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    return model, "".join(pieces)


if __name__ == "__main__":
    main()
