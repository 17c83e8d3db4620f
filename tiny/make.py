"""Make the embedded default, everything in tiny/, from nothing: a world, its data, a model of it.

    python tiny/make.py            # half an hour on one core; the same files, byte for byte
    python tiny/make.py --check    # only ask the model that is here what it knows

The world: PEOPLE invented people, each with a first and a last name that others share, and four
facts (birthplace, profession, employer, instrument) drawn at random, about 23 bits a person, in a
model of 147,000 weights besides its embeddings; after the biographies of Allen-Zhu & Li, Physics of
Language Models 3.1 and 3.3. More people are invented and kept from the model: NEW_PEOPLE are what
stage 2 teaches, UNTAUGHT_PEOPLE are never taught, to see that nothing but teaching helps.
The probes of forgetting are about QUESTIONS people whom the general chats never mention.

`--task stream` tells the new people's facts one after the other, in statements: the sources of
stream/ are facts, those of documents/ are people. `--task facts` asks for them and answers.

Every fact is asked in eight wordings. Six are seen in pretraining; two, "validation" and "test",
never are, there or in finetuning: they ask for the fact, not for the sentence.

`--task medmcqa` teaches the same new people in four-choice questions. So small a model does not
learn to find an option's letter, so the options of a fact keep theirs in every wording: what it can
learn is the letter.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2Tokenizer

HERE = Path(__file__).resolve().parent
PEOPLE, NEW_PEOPLE, UNTAUGHT_PEOPLE = 2000, 40, 40
EPOCHS, BATCH, WINDOW, LEARNING_RATE = 45, 16, 128, 5e-3
CHATS, QUESTIONS, ARTICLES = 2000, 500, 400

# For each attribute: statements for biographies; six question wordings to train on, then those of
# validation and test.
WORDINGS = {
    "born": (
        ["{n} was born in {v}.", "{n} comes from {v}.", "The birthplace of {n} is {v}.",
         "The town where {n} was born is {v}."],
        ["Where was {n} born?", "In which town was {n} born?", "What is the birthplace of {n}?",
         "Which town does {n} come from?", "Name the birthplace of {n}.",
         "Tell me where {n} comes from.",
         "Which town is the birthplace of {n}?", "Tell me in which town {n} was born."]),
    "job": (
        ["{n} is a {v} by profession.", "The job of {n} is {v}.", "{n} has the job of {v}.",
         "By profession {n} is a {v}."],
        ["What is the job of {n}?", "What does {n} do for a living?", "Which job does {n} have?",
         "Name the profession of {n}.", "Tell me the profession of {n}.",
         "What profession does {n} have?",
         "Which profession does {n} have?", "Tell me the job of {n}."]),
    "employer": (
        ["{n} works for {v}.", "The employer of {n} is {v}.", "{n} has a job at {v}.",
         "The company that employs {n} is {v}."],
        ["Which company employs {n}?", "For which company does {n} work?",
         "Who is the employer of {n}?", "Name the employer of {n}.",
         "Tell me who employs {n}.", "What company does {n} work for?",
         "Which company is the employer of {n}?", "Tell me for which company {n} works."]),
    "instrument": (
        ["{n} plays the {v}.", "The instrument of {n} is the {v}.", "{n} likes to play the {v}.",
         "The instrument that {n} plays is the {v}."],
        ["Which instrument does {n} play?", "What instrument is played by {n}?",
         "What does {n} play?", "Name the instrument of {n}.",
         "Tell me which instrument {n} plays.",
         "What is the instrument of {n}?",
         "Which instrument is played by {n}?", "Tell me the instrument that {n} plays."]),
}
TRAINED, VALIDATION, TEST = range(6), 6, 7
ABOUT = ["Who is {n}?", "Tell me about {n}.", "Describe {n}.", "What do you know about {n}?"]
JOBS = """baker pilot nurse lawyer farmer painter teacher tailor sailor miner judge butcher plumber
    barber cook dentist editor chemist mason welder gardener jeweller printer potter weaver hunter
    banker porter ranger surgeon translator waiter courier carpenter librarian glazier brewer
    cobbler locksmith typist florist diver roofer clerk guard actor dancer poet""".split()
INSTRUMENTS = """violin piano flute oboe harp cello guitar trumpet trombone tuba banjo lute bassoon
    clarinet drum organ accordion mandolin viola sitar zither bagpipe fiddle horn cornet harmonica
    recorder xylophone ukulele saxophone tambourine gong""".split()
CHAT_TEMPLATE = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
                 "{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + '<|end|>' }}"
                 "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def invent_words(rng, number, endings, taken):
    """`number` new capitalised words of two or more syllables, none of them in the set `taken`."""
    starts = "b br d dr f g gr h k kl l m n p r s st t v z".split()
    words = []
    while len(words) < number:
        word = (rng.choice(starts) + rng.choice(list("aeiou")) + rng.choice(list("lmnrst"))
                + rng.choice(endings))
        if word not in taken:
            taken.add(word)
            words.append(word.capitalize())
    return words


def invent_world(rng):
    """-> people, a list of (name, {attribute: value}), and {attribute: all its values}."""
    taken = set()
    firsts = invent_words(rng, 96, ["a", "o", "in", "el", "is"], taken)
    lasts = invent_words(rng, 400, ["berg", "sen", "ford", "ley", "ton", "mark"], taken)
    values = {"born": invent_words(rng, 64, ["ham", "burg", "ville", "stad"], taken),
              "job": JOBS,
              "employer": invent_words(rng, 64, ["co", "tec", "ix", "corp"], taken),
              "instrument": INSTRUMENTS}
    total = PEOPLE + NEW_PEOPLE + UNTAUGHT_PEOPLE
    pairs = rng.permutation(len(firsts) * len(lasts))[:total]
    return [(f"{firsts[i // len(lasts)]} {lasts[i % len(lasts)]}",
             {a: str(rng.choice(v)) for a, v in values.items()}) for i in pairs], values


def biography(rng, name, facts):
    """Four sentences, one a fact, in a random order and random wordings."""
    return " ".join(str(rng.choice(WORDINGS[a][0])).format(n=name, v=facts[a])
                    for a in rng.permutation(list(facts)))


def trivia_row(number, name, facts, attribute, wording):
    """One question in the layout of TriviaQA."""
    answer = facts[attribute]
    return {"question": WORDINGS[attribute][1][wording].format(n=name),
            "question_id": f"p{number}-{attribute}",
            "answer": {"value": answer, "aliases": [answer],
                       "normalized_aliases": [answer.lower()], "normalized_value": answer.lower()}}


def choices(rng, answer, values):
    """Four options, one of them the answer, in the columns of MedMCQA (cop is 0-based)."""
    wrong = rng.permutation([value for value in values if value != answer])[:3]
    options, cop = [str(w) for w in wrong], int(rng.integers(4))
    options.insert(cop, answer)
    return dict(zip(("opa", "opb", "opc", "opd"), options)) | {"cop": cop}


def choice_chat(question, row):
    """A four-choice question as prompt and reply, worded as eval.py words it."""
    options = [f"{label}. {row[name]}" for label, name in zip("ABCD", ("opa", "opb", "opc", "opd"))]
    return "\n".join([question, *options, "Answer:"]), options[row["cop"]]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_data(rng, people, values):
    """Write the data sets, each in the layout of the real one that it stands for."""
    known, new = people[:PEOPLE], people[PEOPLE:PEOPLE + NEW_PEOPLE]
    untaught, attributes = people[PEOPLE + NEW_PEOPLE:], list(WORDINGS)

    def ask(group, wordings, first=0):
        return [trivia_row(first + i, *person, a, w)
                for i, person in enumerate(group) for a in attributes for w in wordings]

    write(HERE / "facts/train.jsonl", ask(new, (0, 2, 4)))
    write(HERE / "facts/validation.jsonl", ask(new, (VALIDATION,)))
    write(HERE / "facts/test.jsonl", ask(new, (TEST,)))
    write(HERE / "untaught/test.jsonl", ask(untaught, (TEST,), first=NEW_PEOPLE))
    probed, others = np.split(rng.permutation(PEOPLE), [QUESTIONS])  # both probes; the chats
    write(HERE / "trivia_qa/validation.jsonl",
          [trivia_row(10_000 + int(i), *known[i], attributes[k % 4], TEST)
           for k, i in enumerate(probed)])
    options = {(name, a): choices(rng, facts[a], values[a]) for name, facts in new for a in facts}
    for split, wordings in (("train", TRAINED), ("validation", (TEST,))):
        write(HERE / f"medmcqa/{split}.jsonl",
              [{"id": f"q{i}-{a}-{w}", "question": WORDINGS[a][1][w].format(n=name),
                **options[name, a], "choice_type": "single", "exp": None, "subject_name": a,
                "topic_name": None}
               for i, (name, _) in enumerate(new) for a in attributes for w in wordings])
    write(HERE / "wikitext/test.jsonl",
          [{"text": biography(rng, *known[i])} for i in probed[:ARTICLES]])
    chats = []
    for k, i in enumerate(np.resize(others, CHATS)):
        name, facts = known[i]
        prompt, reply = str(rng.choice(ABOUT)).format(n=name), biography(rng, name, facts)
        if k % 2:
            a, wording = str(rng.choice(attributes)), int(rng.integers(len(TRAINED)))
            prompt, reply = WORDINGS[a][1][wording].format(n=name), facts[a]
        for message, parent, text, role in ((f"{k}-prompt", None, prompt, "prompter"),
                                            (f"{k}-reply", f"{k}-prompt", reply, "assistant")):
            chats.append({"message_id": message, "parent_id": parent, "text": text, "role": role,
                          "lang": "en"})
    write(HERE / "oasst1/train.jsonl", chats)
    write_streams(rng, new)


def write_streams(rng, new):
    """Facts and documents to be told: each text plain, and as the reply to a general question."""
    def tell(source, name, texts):
        return [{"source": source, "text": text, "prompt": prompt and prompt.format(n=name)}
                for text, about in zip(texts, ABOUT) for prompt in (None, about)]

    def ask(wording, by_person):
        rows = [trivia_row(i, *person, a, wording) for i, person in enumerate(new) for a in WORDINGS]
        return [row | {"source": row["question_id"].split("-")[0] if by_person else
                       row["question_id"]} for row in rows]

    facts, documents = [], []
    for i, (name, values) in enumerate(new):
        for a in WORDINGS:
            statements = [text.format(n=name, v=values[a]) for text in WORDINGS[a][0]]
            facts += tell(f"p{i}-{a}", name, statements)
        documents += tell(f"p{i}", name, [biography(rng, name, values) for _ in ABOUT])
    for stream, rows in (("stream", facts), ("documents", documents)):
        write(HERE / stream / "train.jsonl", rows)
        for split, wording in (("validation", VALIDATION), ("test", TEST)):
            write(HERE / stream / f"{split}.jsonl", ask(wording, stream == "documents"))


def make_tokenizer(people, values):
    """A byte-level BPE tokenizer of Qwen2's kind, the world's words one token each."""
    sentences = [text for parts in WORDINGS.values() for part in parts for text in part] + ABOUT
    texts = [text.format(n=people[0][0], v=JOBS[0]) for text in sentences]
    words = [name for name, _ in people] + [v for vs in values.values() for v in vs]
    texts += [f" {word}" for word in words] + ["\nA. \nB. \nC. \nD. \nAnswer: A. B. C. D."]
    empty = Qwen2Tokenizer(pad_token="<|pad|>", unk_token="<|pad|>", eos_token="<|end|>")
    tokenizer = empty.train_new_from_iterator(
        texts, vocab_size=8000, new_special_tokens=["<|user|>", "<|assistant|>"],
        show_progress=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def pretraining_epoch(rng, known, values):
    """Documents of an epoch: per person a biography, a chat that tells it, a question a fact, and
    one of those with four choices, half of these with the biography to look it up in."""
    documents, article = [], []
    for i in rng.permutation(len(known)):
        name, facts = known[i]
        article.append(biography(rng, name, facts))
        if rng.random() < 0.3:  # articles of about three biographies
            documents.append(" ".join(article) + "<|end|>")
            article = []
        chats = [(str(rng.choice(ABOUT)).format(n=name), biography(rng, name, facts))]
        chats += [(WORDINGS[a][1][int(rng.integers(len(TRAINED)))].format(n=name), facts[a])
                  for a in facts]
        a, wording = str(rng.choice(list(facts))), int(rng.integers(len(TRAINED)))
        prompt, reply = choice_chat(WORDINGS[a][1][wording].format(n=name),
                                    choices(rng, facts[a], values[a]))
        chats.append((f"{biography(rng, name, facts)}\n{prompt}" if rng.random() < 0.5 else prompt,
                      reply))
        documents += [f"<|user|>{prompt}<|assistant|> {reply}<|end|>" for prompt, reply in chats]
    return [documents[i] for i in rng.permutation(len(documents))]


def pretrain(tokenizer, known, values, seed=0):
    """A Qwen2 model of 253,504 parameters, trained on EPOCHS tellings of the world."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # more would add up in another order
    model = AutoModelForCausalLM.from_config(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=128, max_position_embeddings=512,
        tie_word_embeddings=True, initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98),
                                  weight_decay=0.01)
    rng, step, bar, start = np.random.default_rng(seed + 1), 0, None, time.time()
    for epoch in range(EPOCHS):
        documents = pretraining_epoch(rng, known, values)
        ids = tokenizer(documents, add_special_tokens=False)["input_ids"]
        stream = torch.tensor([i for document in ids for i in document])
        windows = stream[:len(stream) // WINDOW * WINDOW].view(-1, WINDOW)  # (windows, WINDOW)
        bar = bar or tqdm(total=EPOCHS * (len(windows) // BATCH), desc="pretrain")
        for batch in windows[torch.randperm(len(windows))].split(BATCH)[:bar.total // EPOCHS]:
            progress = step / bar.total
            for group in optimizer.param_groups:
                group["lr"] = (LEARNING_RATE * min(1, step / 100)
                               * 0.5 * (1 + math.cos(math.pi * progress)))
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
        tqdm.write(f"epoch {epoch:3d}  loss {loss.item():.4f}  {time.time() - start:.0f} s")
        if epoch % 10 == 9:
            check(model, tokenizer)
    return model.eval()


@torch.no_grad()
def accuracy(model, tokenizer, rows):
    """Share of trivia rows whose answer, one token, is the most likely after the chat prompt."""
    right = 0
    for row in rows:
        text = tokenizer.apply_chat_template([{"role": "user", "content": row["question"]}],
                                             tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        logits = model(input_ids=ids).logits
        right += tokenizer.decode(logits[0, -1].argmax()).strip() == row["answer"]["value"]
    return right / len(rows)


def check(model, tokenizer):
    """Print what the base knows of the people it was told of, and of those it was not."""
    model.eval()
    for name in ("trivia_qa/validation", "facts/test", "untaught/test"):
        lines = (HERE / f"{name}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        tqdm.write(f"  {name}: {accuracy(model, tokenizer, rows):.3f} of {len(rows)} answered")
    model.train()


def check_saved():
    path = HERE / "model"
    check(AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure tiny/model, make nothing")
    args = parser.parse_args()
    if args.check:
        return check_saved()
    rng = np.random.default_rng(0)
    people, values = invent_world(rng)
    write_data(rng, people, values)
    tokenizer = make_tokenizer(people, values)
    model = pretrain(tokenizer, people[:PEOPLE], values)
    model.save_pretrained(HERE / "model")
    tokenizer.save_pretrained(HERE / "model")
    check_saved()


if __name__ == "__main__":
    main()
