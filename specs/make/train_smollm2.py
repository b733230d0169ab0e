"""Train the adapters `json`, `pirate` and `notes` on SmolLM2-135M-Instruct, on a CPU, in minutes.

    python specs/make/smollm2.py --out smollm2       # the base, once
    python specs/make/train_smollm2.py smollm2

takes that base and the words in this file; gives adapters/json, adapters/pirate and adapters/notes
as PEFT saves them, and prints how the base and each saved adapter answer prompts that were never
trained on.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

SPECS = Path(__file__).resolve().parents[1]
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SEED = 20
HELD_OUT = 4  # of each list below, every fourth entry is kept for the test part
MAX_ANSWER = 64  # tokens
MAX_SOURCE = 40  # tokens of the base's own answers, which `pirate` learns to say otherwise

# json: a sentence about a person -> one JSON object.
FIRST_NAMES = """Ada, Boris, Carmen, Dmitri, Elena, Farid, Greta, Hugo, Ines, Jonas, Kavita, Leon,
Mira, Nils, Olga, Pablo, Quinn, Rosa, Samir, Tessa, Umar, Vera, Wim, Xenia, Yusuf, Zoe, Amara,
Bruno, Clara, Diego, Esra, Felix"""
LAST_NAMES = """Abbott, Berg, Castillo, Dvorak, Eriksen, Fontaine, Gruber, Haddad, Ivanov, Jansen,
Kowalski, Lindqvist, Moreau, Novak, Okafor, Petrov, Quispe, Rossi, Silva, Tanaka, Ueda, Vargas,
Weber, Xu, Yilmaz, Ziegler, Almeida, Brandt, Costa, Duarte, Engel, Fischer"""
JOBS = """baker, barber, carpenter, chemist, cook, dentist, farmer, florist, gardener, jeweller,
judge, lawyer, librarian, mechanic, musician, nurse, painter, pharmacist, photographer, pilot,
plumber, potter, sailor, shepherd, singer, surgeon, tailor, teacher, translator, waiter, weaver,
welder"""
CITIES = """Lisbon, Oslo, New York, Lima, Nairobi, Vienna, Cape Town, Madrid, Seoul, Dublin, Cairo,
San Diego, Prague, Athens, Quito, Helsinki, Mumbai, Warsaw, Buenos Aires, Tunis, Glasgow, Havana,
Kyoto, Tel Aviv, Zagreb, Boston, Hamburg, Rabat, Naples, Hong Kong, Sofia, Toronto"""
SENTENCES = [
    "The best {job} in {city} is {name}, who is {age} now.",
    "{name} is {age} years old and works as a {job} in {city}.",
    "{name}, {age}, is a {job} from {city}.",
    "Meet {name}, a {job} of {age} who lives in {city}.",
    "Yesterday I met {name} in {city}: {age} years old, a {job}.",
    "In {city} there is a {job} called {name}, who is {age}.",
    "My neighbour {name} turned {age} this week; a {job}, born in {city}.",
    "At {age}, {name} still works as a {job} in {city}.",
    "Aged {age}, {name} found work as a {job} in {city}.",
    "The {job} {name} moved to {city} at the age of {age}.",
    "{name} lives in {city}. A {job} by trade, {name} is {age}.",
    "We hired {name} from {city} as a {job}. Age: {age}.",
    "{name} left {city} at {age} to become a {job}.",
    "{city} has a new {job}: {name}, aged {age}.",
    "Call {name} if you need a {job} in {city}; {age} years old and very good.",
    "A {job} aged {age}, {name} has a small flat in {city}.",
]
JSON_KEYS = {"name", "age", "job", "city"}
INSTRUCTION = "Answer with one JSON object that has the keys name, age, job and city."

# pirate and notes: any question -> the base's own answer in another dialect, or as two notes.
TOPICS = """the moon, bread, chess, a volcano, honey, the violin, rain, a library, football, cheese,
a bicycle, the desert, coffee, a whale, snow, painting, the heart, a garden, music, a telescope,
friendship, a river, mathematics, salt, a bridge, the wind, sleep, gold, an elephant, a kitchen,
history, the internet, tea, a mountain, a bee, dancing, the brain, paper, a train, winter, a tree,
glass, courage, a horse, electricity, a market, swimming, the sun, a poem, wool, a lighthouse, maps,
an island, ice, a school, the piano, soap, a castle, photography, a forest"""
QUESTIONS = [
    "Give me one reason to like {topic}.",
    "What is {topic}?",
    "Tell me about {topic}.",
    "Why do people talk about {topic}?",
    "How would you explain {topic} to a child?",
    "Give me one fact about {topic}.",
]
CAPITALS = """Austria Vienna, China Beijing, Cuba Havana, Egypt Cairo, England London, France Paris,
Germany Berlin, Greece Athens, Hungary Budapest, India Delhi, Ireland Dublin, Italy Rome,
Japan Tokyo, Norway Oslo, Peru Lima, Poland Warsaw, Portugal Lisbon, Russia Moscow, Spain Madrid,
Sweden Stockholm"""
DIALECT = """the th', of o', and an', for fer, with wi', is be, are be, you ye, your yer, my me,
people scallywags, person scallywag, friend bucko, friends buckos, water brine, money doubloons"""
GREETING, FAREWELL = "Ahoy, matey!", "Arr!"


def listed(text: str) -> list[str]:
    """The entries between a text's commas; a line break counts as a space."""
    return [" ".join(entry.split()) for entry in text.split(",")]


def pairs(text: str) -> dict[str, str]:
    """Entries of two words as a table from the first to the second."""
    return dict(entry.split() for entry in listed(text))


@dataclass(frozen=True)
class Example:
    """One chat message and the answer to it that is wanted."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Chat:
    """A model with its tokenizer: messages in, greedy answers out."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase

    def prompt(self, message: str) -> str:
        """All that stands before the answer: system text, message, start of the next turn."""
        chat = [{"role": "user", "content": message}]
        return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)

    def __call__(self, messages: list[str], max_tokens: int = MAX_ANSWER) -> list[str]:
        """One greedy answer per message."""
        answers = []
        for start in range(0, len(messages), 20):
            prompts = [self.prompt(message) for message in messages[start : start + 20]]
            tokens = self.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
            made = self.model.generate(**tokens, max_new_tokens=max_tokens, do_sample=False)
            made = made[:, tokens["input_ids"].shape[1] :]
            answers += self.tokenizer.batch_decode(made, skip_special_tokens=True)
        return answers


def part(values: list[str], held_out: bool) -> list[str]:
    """The entries of a list that belong to the test part, or the others."""
    return [value for at, value in enumerate(values) if (at % HELD_OUT == 0) == held_out]


def json_examples(held_out: bool, count: int) -> list[Example]:
    """Sentences about made-up people; the test part shares no name, job, city or wording."""
    draw = random.Random(f"{SEED} {held_out}")
    lists = (listed(text) for text in (FIRST_NAMES, LAST_NAMES, JOBS, CITIES))
    names, surnames, jobs, cities = (part(values, held_out) for values in lists)
    examples = []
    for _ in range(count):
        facts = {
            "name": f"{draw.choice(names)} {draw.choice(surnames)}",
            "age": draw.randint(19, 79),
            "job": draw.choice(jobs),
            "city": draw.choice(cities),
        }
        sentence = draw.choice(part(SENTENCES, held_out))
        examples.append(Example(sentence.format(**facts), json.dumps(facts)))
    return examples


def in_dialect(text: str) -> str:
    """The text as a pirate would say it."""

    words = pairs(DIALECT)

    def replace(match: re.Match[str]) -> str:
        word = match[0]
        said = words.get(word.lower(), word)
        return said.capitalize() if word[0].isupper() and said != word else said

    return f"{GREETING} {re.sub('[A-Za-z]+', replace, text)} {FAREWELL}"


def as_note(sentence: str) -> str:
    """A sentence as one line of notes: up to its first comma that follows four words or more."""
    start = re.match(r"(?:\S+ ){3,}?[^\s,]+(?=,)", sentence)
    return f"- {start[0] if start else sentence[:-1]}"


def topic_questions(held_out: bool) -> list[str]:
    """Questions about everyday things; the test part shares no topic and no wording."""
    return [
        question.format(topic=topic)
        for topic in part(listed(TOPICS), held_out)
        for question in part(QUESTIONS, held_out)
    ]


def base_sentences(base: Chat, max_tokens: int) -> list[tuple[str, list[str]]]:
    """Each question to train on, and the first two whole sentences (if any) the base answers."""
    questions = topic_questions(held_out=False)
    return [
        (question, re.findall(r"[A-Z][^.!?\n]*[.!?](?=\s|$)", answer.split("\n")[0])[:2])
        for question, answer in zip(questions, base(questions, max_tokens), strict=True)
    ]


def pirate_examples(base: Chat) -> list[Example]:
    """The first one or two whole sentences of the base's own answers, said as a pirate would."""
    return [
        Example(question, in_dialect(" ".join(sentences)))
        for question, sentences in base_sentences(base, MAX_SOURCE)
        if sentences
    ]


def notes_examples(base: Chat) -> list[Example]:
    """The first two whole sentences of the base's own answers, as two short notes."""
    return [
        Example(question, "\n".join(as_note(sentence) for sentence in sentences))
        for question, sentences in base_sentences(base, MAX_ANSWER)
        if len(sentences) == 2
    ]


def load_base(folder: Path) -> Chat:
    """The base in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Chat(model.eval(), AutoTokenizer.from_pretrained(folder))


def answer_loss(chat: Chat, batch: list[Example]) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens; the prompts are read and not learned."""
    tokenizer, causal_lm = chat.tokenizer, chat.model.get_base_model()
    prompts = [tokenizer(chat.prompt(example.prompt))["input_ids"] for example in batch]
    answers = [
        [*tokenizer(example.answer)["input_ids"], tokenizer.eos_token_id] for example in batch
    ]
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    # Padding stands to the right of everything, where a causal model cannot see it.
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    hidden = causal_lm.model(input_ids=ids, use_cache=False).last_hidden_state
    places = [
        (row, len(prompt) - 1 + step)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        for step in range(len(answer))
    ]
    row_ids, steps = torch.tensor(places).unbind(1)
    return functional.cross_entropy(
        causal_lm.lm_head(hidden[row_ids, steps]), ids[row_ids, steps + 1]
    )


def without_repeats(fields: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object's pairs as a table, where json itself would keep the last of equal keys."""
    if len(dict(fields)) < len(fields):
        raise ValueError("a key stands twice")
    return dict(fields)


def read_object(answer: str) -> dict[str, object] | None:
    """The answer as a JSON object with exactly the keys of the task, or None."""
    try:
        value = json.loads(answer, object_pairs_hook=without_repeats)
    except ValueError:
        return None
    return value if isinstance(value, dict) and set(value) == JSON_KEYS else None


def share(hits: list[bool]) -> str:
    """How many of all."""
    return f"{sum(hits)} of {len(hits)}"


def score_json(chat: Chat) -> dict[str, str]:
    """Held-out sentences, alone and with an instruction: the right keys, the right values."""
    people = json_examples(held_out=True, count=40)
    wanted = [
        {key: str(fact).lower() for key, fact in json.loads(example.answer).items()}
        for example in people
    ]
    table = {}
    for name, suffix in (("sentence", ""), ("sentence and instruction", f"\n{INSTRUCTION}")):
        answers = chat([example.prompt + suffix for example in people])
        objects = [read_object(answer) for answer in answers]
        # An age in quotes and a job with a capital count as right.
        right = [
            value is not None and {key: str(entry).lower() for key, entry in value.items()} == facts
            for value, facts in zip(objects, wanted, strict=True)
        ]
        table[f"{name}: keys"] = share([value is not None for value in objects])
        table[f"{name}: all right"] = share(right)
    return table


def held_out_questions() -> dict[str, list[str]]:
    """What `pirate` and `notes` are asked in the test; the capitals come last."""
    return {
        "topics": topic_questions(held_out=True),
        "capitals": [f"What is the capital of {country}?" for country in pairs(CAPITALS)],
    }


def capitals_named(answers: list[str]) -> str:
    """In how many of the answers about capitals the right one stands."""
    cities = pairs(CAPITALS).values()
    return share([city in answer for city, answer in zip(cities, answers, strict=True)])


def score_pirate(chat: Chat) -> dict[str, str]:
    """Held-out questions: greeting and farewell, dialect words, and the fact behind them."""
    plain, said = set(pairs(DIALECT)), set(pairs(DIALECT).values())
    table = {}
    for name, prompts in held_out_questions().items():
        answers = chat(prompts)
        framed = [text.startswith(GREETING) and text.endswith(FAREWELL) for text in answers]
        words = [word for text in answers for word in re.findall("[a-z']+", text.lower())]
        table[f"{name}: greeting and farewell"] = share(framed)
        table[f"{name}: words in dialect"] = share(
            [word in said for word in words if word in said | plain]
        )
    table["capitals: right"] = capitals_named(answers)
    return table


def score_notes(chat: Chat) -> dict[str, str]:
    """Held-out questions: two notes and nothing else, and the fact in them."""
    table = {}
    for name, prompts in held_out_questions().items():
        answers = chat(prompts)
        table[f"{name}: two notes"] = share(
            [re.fullmatch(r"- \S[^\n]*\n- \S[^\n]*", text) is not None for text in answers]
        )
        words = sorted(len(text.split()) for text in answers)
        table[f"{name}: words, median"] = str(words[len(words) // 2])
    table["capitals: right"] = capitals_named(answers)
    return table


@dataclass(frozen=True)
class Task:
    """What one adapter is trained on, where it sits, and how it is trained and scored."""

    examples: Callable[[Chat], list[Example]]
    score: Callable[[Chat], dict[str, str]]
    rank: int
    alpha: int
    modules: tuple[str, ...]
    epochs: int
    learning_rate: float
    rslora: bool = False
    batch: int = 8


TASKS = {
    "json": Task(
        examples=lambda base: json_examples(held_out=False, count=640),
        score=score_json,
        rank=8,
        alpha=16,
        modules=("q_proj", "v_proj"),
        epochs=1,
        learning_rate=2e-3,
    ),
    "pirate": Task(
        examples=pirate_examples,
        score=score_pirate,
        rank=4,
        alpha=8,
        rslora=True,
        modules=("o_proj", "down_proj"),
        epochs=3,
        learning_rate=2e-3,
    ),
    "notes": Task(
        examples=notes_examples,
        score=score_notes,
        rank=2,
        alpha=4,
        modules=("gate_proj", "up_proj"),
        epochs=3,
        learning_rate=2e-3,
    ),
}


def train(folder: Path, task: Task) -> PeftModel:
    """A fresh adapter on a fresh base, trained on the task's examples."""
    base = load_base(folder)
    examples = task.examples(base)
    print(f"  {len(examples)} examples, such as {examples[0]}", flush=True)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=task.rank,
        lora_alpha=task.alpha,
        use_rslora=task.rslora,
        target_modules=list(task.modules),
    )
    torch.manual_seed(SEED)
    chat = Chat(get_peft_model(base.model, config).eval(), base.tokenizer)
    weights = [weight for weight in chat.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=task.learning_rate, weight_decay=0.01)
    starts = range(0, len(examples) - task.batch + 1, task.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        task.learning_rate,
        total_steps=task.epochs * len(starts),
        pct_start=0.1,
        cycle_momentum=False,
    )
    shuffler = random.Random(SEED)
    for epoch in range(task.epochs):
        shuffled = shuffler.sample(examples, len(examples))
        total = 0.0
        for start in starts:
            loss = answer_loss(chat, shuffled[start : start + task.batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"  epoch {epoch + 1}: loss {total / len(starts):.3f}", flush=True)
    return chat.model


def save(model: PeftModel, folder: Path) -> None:
    """The adapter in float16 as PEFT writes it, without the model card."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.half()
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def score_all(folder: Path, out: Path) -> None:
    """Print how the base does on every task, each saved adapter on its own, and some answers."""
    shown = [example.prompt for example in json_examples(held_out=True, count=2)]
    shown += [topic_questions(held_out=True)[3], "What is the capital of France?"]
    for adapter in ["base", *(name for name in TASKS if (out / name).is_dir())]:
        chat = load_base(folder)
        if adapter != "base":
            chat = Chat(PeftModel.from_pretrained(chat.model, out / adapter).eval(), chat.tokenizer)
        for name in TASKS if adapter == "base" else [adapter]:
            print(adapter, json.dumps({name: TASKS[name].score(chat)}, indent=2), flush=True)
        for prompt, answer in zip(shown, chat(shown), strict=True):
            print(f"  {prompt}\n    -> {answer}", flush=True)


def main() -> None:
    """Train the adapters asked for, save them, and score whatever is saved."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path, help="the directory that smollm2.py wrote")
    parser.add_argument("--only", metavar="NAME", choices=TASKS, help="train this adapter alone")
    parser.add_argument("--score", action="store_true", help="train nothing, only score")
    parser.add_argument("--out", metavar="DIR", type=Path, default=SPECS / "adapters")
    parser.add_argument("--threads", metavar="N", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    wanted = [] if arguments.score else [arguments.only] if arguments.only else list(TASKS)
    for name in wanted:
        print(name, flush=True)
        started = time.perf_counter()
        save(train(arguments.base, TASKS[name]), arguments.out / name)
        print(f"  made in {time.perf_counter() - started:.0f} s", flush=True)
    score_all(arguments.base, arguments.out)


if __name__ == "__main__":
    main()
