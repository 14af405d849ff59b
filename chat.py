"""Ask about an image: python chat.py runs/tiny/phase3 --image FILE --question TEXT

The answer appears as it is generated; then the experts that the image's patches, the question and
each token of the answer were routed to. Without --question it reads questions from the terminal,
each asked with the earlier questions and answers before it, until an empty line. phantom:SEED is an
embedded image, whose truth is printed beside the answer. Not a medical device.
"""

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

import ops
from checkpoint import load_model
from config import Common, UserError, argument, flag, one_line, warn_once
from data import Encoded, Sample, Text, collate, encode_prompt
from engine import familiar
from engine.cli import parse, user_errors
from engine.overlay import Routes, check_png
from engine.routes import forced_routers, replaced_routers
from model import autocast, choose_device, generate
from sources import dicom, phantoms, signs
from sources.images import Images
from sources.load import MAX_TURNS
from sources.questions import about_image, about_signs, answer

DEMO = "phantom:2000000004"  # held out, with a finding
HELP = """/image FILE, phantom:SEED or none   another image, and a new conversation
/reset            a new conversation about this image
/save FILE.png    save the image as the model sees it, and the first expert of each patch
                  and token
/quit             or an empty line: end"""


@dataclass(frozen=True)
class ChatConfig(Common):
    """Ask a checkpoint about an image."""

    lacks = ("data", "batch_size", "max_missing", "max_bad", "follow_links", "image_folder",
             "router_labels", "lang", "json")  # fmt: skip
    checkpoint: str = argument("DIR of a finished phase")
    image: str | None = flag(None, f"FILE, phantom:SEED or none (default of phantoms: {DEMO})")
    question: str | None = flag(None, "what to ask (default: read questions from the terminal)")
    save: str | None = flag(None, "save image and experts, as /save does, to this FILE.png")
    expert: int | None = flag(None, "route every token to this expert alone")
    max_new: int = flag(64, "longest answer, in tokens", least=1)
    temperature: float = flag(0.0, "0: always the likeliest token")
    top_p: float = flag(1.0, "sample from the likeliest tokens that make up this probability")
    router: str | None = flag(None, "replace the router: a name or FILE.py:Class")


def find_image(name: str) -> Path | int | None:
    """FILE, phantom:SEED or none. Raises UserError for a phantom without a number."""
    if name.startswith("phantom:"):
        seed = name.removeprefix("phantom:")
        if not seed.isdecimal():
            raise UserError(f"--image {name}: must be phantom:SEED, a whole number")
        return int(seed)
    return None if name == "none" else Path(name)


def truth(seed: int, question: str) -> str:
    """What is true of an embedded image; first the answer, to one of its own questions."""
    phantom = phantoms.draw(seed)
    right = answer(phantom, question)
    return "truth: " + "; ".join([right] * bool(right) + [phantoms.caption(phantom)])


class Stream:
    """Prints tokens as text as soon as it is certain: a character may take several tokens."""

    def __init__(self, text: Text):
        self.text, self.ids, self.n_printed = text, [], 0

    def add(self, token: int) -> None:
        self.ids.append(token)
        decoded = self.text.decode(self.ids)
        if not decoded.endswith("\ufffd"):
            new = decoded[self.n_printed :] if self.n_printed else decoded.lstrip()
            self.n_printed = len(decoded)
            print(new, end="", flush=True)


class Chat:
    """A checkpoint, and a conversation about one image."""

    def __init__(self, flags: ChatConfig):
        self.flags = flags
        self.device, self.dtype = choose_device(flags.device, flags.dtype)
        ops.choose(flags.kernels, self.device)
        folder = Path(flags.checkpoint)
        self.model, self.text, info = load_model(folder, self.device, self.dtype, flags.router)
        self.routers = forced_routers(self.model, flags.expert)
        self.known, self.questions = familiar.read(folder), info.get("questions", [])
        self.images = Images(self.model.config.vision.image_size, pad=True)
        if (image := flags.image) is None:
            image = DEMO if "phantoms" in " ".join(info["flags"].get("data", ())) else "none"
            print(f"The image is {image}, by default; choose one by --image.", file=sys.stderr)
        self.begin(image)

    def begin(self, name: str) -> None:
        """A new conversation about this image. Raises UserError."""
        image = dicom.viewed(find_image(name), self.flags.window, self.flags.frame)
        if image is not None:
            pixels = self.images.read(image).to(self.device)  # (3, S, S)
            with autocast(self.device, self.dtype):
                if unlike := familiar.unlike(self.model, pixels, self.known):
                    print(unlike, file=sys.stderr)
        self.image, self.history = image, []

    def is_phantom(self) -> bool:
        return isinstance(self.image, int)

    def encode(self, question: str) -> Encoded:
        """The question behind the earlier ones; the first of those go when it is too long."""
        config, has_image = self.model.config, self.image is not None
        alone = encode_prompt(question, has_image, self.text, config)
        while self.history:
            with suppress(UserError):  # too long, with an answer
                if len(self.history) < MAX_TURNS:
                    return encode_prompt(question, has_image, self.text, config, self.history,
                                         self.flags.max_new)  # fmt: skip
            print(f"forgotten: {self.history.pop(0)[0]!r}; a dialogue has {MAX_TURNS} questions, "
                  f"and {config.decoder.max_len} positions", file=sys.stderr)  # fmt: skip
        return alone

    def ask(self, question: str) -> None:
        """Print the answer, what is true of an embedded image, and the tokens' experts."""
        config, text, flags = self.model.config, self.text, self.flags
        if flags.max_new >= config.decoder.max_len:
            warn_once(f"--max-new {flags.max_new}: the model reads {config.decoder.max_len} "
                      "positions, the question among them; an answer ends there")  # fmt: skip
        encoded = self.encode(question)
        sample = Sample("question", "you", "chat", self.image, ((question, ""),))
        batch = collate([sample], [encoded], self.images, text.eos_id, "left").to(self.device)
        generator = torch.Generator(self.device).manual_seed(flags.seed)
        stream, steps = Stream(text), []
        max_new = min(flags.max_new, config.decoder.max_len - len(encoded[0]))
        with replaced_routers(self.model, self.routers), autocast(self.device, self.dtype):
            for step in generate(self.model, batch, text.eos_id, max_new, flags.temperature,
                                 flags.top_p, generator):  # fmt: skip
                steps.append(step)
                if (token := int(step.tokens[0])) != text.eos_id:
                    stream.add(token)
        print()
        self.history.append((question, text.decode(stream.ids).strip()))
        if self.is_phantom():
            print(truth(self.image, question))
        self.routes = Routes(config, batch, steps)
        print(end=self.routes.table(text))
        if flags.save:
            self.save(flags.save)

    def save(self, file: str) -> None:
        """Save the image and the first expert of each patch and token. Raises UserError."""
        if self.image is None or not self.history:
            raise UserError(f"{file}: nothing to save yet: it needs an image and a question")
        check_png(file, str(self.image))
        self.routes.overlay(self.images.read(self.image), self.text).save(file)
        print(f"saved {file}", file=sys.stderr)

    def command(self, line: str) -> None:
        """One of HELP. Raises UserError for any other."""
        name, _, rest = line.partition(" ")
        if name in ("/image", "/save") and not rest:
            raise UserError(f"{name}: needs a name; /help lists the commands")
        if name == "/image":
            self.begin(rest.strip())
            print(f"The image is {rest.strip()}.", file=sys.stderr)
        elif name == "/save":
            self.save(rest.strip())
        elif line == "/reset":
            self.history = []
        elif line == "/help":
            examples = map(one_line, self.questions)
            if self.is_phantom():
                phantom = phantoms.draw(self.image)
                asked = about_image(phantom) + about_signs(phantom, signs.known(8), 4)
                examples = (q.question for q in asked)
            print(HELP, "It understands questions like these of its training data:", *examples,
                  sep="\n")  # fmt: skip
        else:
            raise UserError(f"{line}: no such command; /help lists them")


@user_errors
def main(argv: list[str] | None = None) -> None:
    flags = parse(ChatConfig, argv, "chat.py")
    if 0 < flags.temperature < 0.01:  # it overflows
        raise UserError(f"--temperature {flags.temperature}: must be 0 or from 0.01 up")
    if not 0 < flags.top_p <= 1:
        raise UserError(f"--top-p {flags.top_p}: must be above 0 and at most 1")
    if flags.question is not None and flags.question.strip()[:1] in ("", "/"):
        raise UserError(f"--question {flags.question!r}: is empty, or a command")
    if flags.save:
        check_png(flags.save, flags.image)
    chat = Chat(flags)
    if flags.question is not None:
        print("Not a medical device.", file=sys.stderr)
        chat.ask(flags.question)
        return
    print("Ask about the image. /help has commands and examples; an empty line ends. "
          "Not a medical device.", file=sys.stderr)  # fmt: skip
    with suppress(ImportError):
        import readline  # noqa: F401  history and arrow keys, where there is one
    with suppress(EOFError, KeyboardInterrupt):
        while (line := input("> ").strip()) not in ("", "/quit", "quit", "exit"):
            try:
                chat.command(line) if line.startswith("/") else chat.ask(line)
            except (UserError, OSError) as error:
                print(one_line(str(error)), file=sys.stderr)


if __name__ == "__main__":
    main()
