"""See the experts work: a page to ask about an image, and to ask another expert the same.

    python -m lab.demo runs/tiny/phase3
    python -m lab.demo runs/top1/phase3 runs/tiny/phase3 --router my_router.py:Top1

Choose an embedded image or drop a file, ask, and see which experts the patches and tokens were
routed to; beside it, the same question with the routing changed, or to another checkpoint. The page
is for this machine alone and asks nothing from outside; nothing uploaded is kept. Its words are in
lab/demo.html. Needs gradio (requirements-lab.txt). Not a medical device.
"""

import base64
import os
import shutil
import signal
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import jinja2  # comes with torch
from PIL import Image
from torch import Tensor

from chat import DEMO, truth
from config import MODALITIES, Common, UserError, argument, flag, one_line
from engine import cli
from engine.overlay import COLOURS, Routes, draw_patches, opacity, png, rgb, shown_token, title
from lab.interventions import OWN, Checkpoint, answers, interventions
from metrics import is_right
from sources import phantoms, signs
from sources.questions import about_image, about_signs, answer

HERE = Path(__file__).parent
HOST, FACT = "127.0.0.1", "What does the parital sign mean here?"  # otherwise in each modality
LARGEST = "256mb"  # upload


@dataclass(frozen=True)
class DemoConfig(Common):
    """Open a page on which the experts can be seen at work."""

    lacks = ("data", "batch_size", "max_missing", "max_bad", "follow_links", "image_folder",
             "router_labels", "lang", "seed", "json")  # fmt: skip
    checkpoint: tuple[str, ...] = argument("DIR of a finished phase; further ones to compare")
    port: int = flag(7860, "where the page is, on this machine alone; 0: any that is free")
    max_new: int = flag(64, "longest answer, in tokens", least=1)
    router: str | None = flag(None, "replace the first one's router: a name or FILE.py:Class")


class Shown(NamedTuple):
    """The image of the page."""

    title: str
    seed: int | None  # None: an uploaded file
    modality: str | None
    pixels: list[Tensor]  # (3, S, S) uint8, for each checkpoint


def base64_png(image: Image.Image, colours: int = 200) -> str:
    return base64.b64encode(png(image, colours)).decode()


def describe(routes: Routes, pixels: Tensor, c: Checkpoint) -> dict:
    """What lab/demo.html shows of the routes of an answer; {} of a dense model."""
    if (moe := c.config.moe) is None:
        return {}

    def bars(shares: list[float]) -> list[tuple[str, str, float]]:
        named = enumerate(zip(routes.names, shares, strict=True))
        return [(title(e, name), COLOURS[e % len(COLOURS)], share) for e, (name, share) in named]

    blocks, n_asked = [], int((~routes.is_patch & ~routes.is_answer).sum())
    rows = zip(routes.blocks, routes.patches(), routes.tokens(c.text), routes.load(), strict=True)
    for number, patches, tokens, load in rows:
        largest, first = patches.max(dim=-1)
        tinted = [(shown_token(t.text), (*rgb(t.expert), opacity(t.gate))) for t in tokens]
        blocks.append({
            "number": number, "png": base64_png(draw_patches(pixels, patches)),
            "counts": Counter(first.masked_fill(largest == 0, -1).tolist()).most_common(),
            "question": tinted[:n_asked], "answer": tinted[n_asked:], "load": bars(load),
        })  # fmt: skip
    return {"names": routes.names, "blocks": blocks, "is_modality": moe.router == "modality",
            "router": bars(routes.probabilities()), "table": routes.table(c.text).strip("\n"),
            "picture": base64_png(routes.overlay(pixels, c.text), 0)}  # fmt: skip


class Page:
    """What the page does, without gradio: values in, HTML out."""

    def __init__(self, checkpoints: list[Checkpoint], max_new: int):
        self.checkpoints, self.max_new = checkpoints, max_new
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        self.html = environment.from_string((HERE / "demo.html").read_text("utf-8")).module
        self.changes = {k: v for c in checkpoints for k, v in interventions(c.config.moe).items()}
        how = "1" if len(checkpoints) == 1 and "1" in self.changes else OWN
        self.usual = {"image": DEMO.removeprefix("phantom:"), "question": FACT, "change": how,
                      "with": str(len(checkpoints) - 1)}  # fmt: skip

    def phantom(self, seed: int | None, modality: str | None = None) -> Shown:
        """The first embedded image from this seed on, of the modality; None: any."""
        first = min(max(int(self.usual["image"] if seed is None else seed), 0), 2**53)
        found = ((s, phantoms.plan(s)[1]["modality"]) for s in count(first))
        seed, own = next(pair for pair in found if modality in (None, pair[1]))
        return Shown(f"phantom:{seed}", seed, own, [c.images.read(seed) for c in self.checkpoints])

    def file(self, path: Path) -> Shown:
        """Read an uploaded file, and delete it. Raises UserError."""
        try:
            pixels = [c.images.read(path) for c in self.checkpoints]
            return Shown(one_line(path.name), None, None, pixels)
        except UserError as error:
            raise UserError(str(error).replace(str(path), path.name)) from error
        finally:
            shutil.rmtree(path.parent)  # gradio makes a folder for each

    def image(self, shown: Shown) -> str:
        picture, unlike = draw_patches(shown.pixels[0]), self.checkpoints[0].unlike(shown.pixels[0])
        return self.html.image(base64_png(picture), shown.title, unlike)

    def examples(self, shown: Shown) -> list[str]:
        """Questions about an embedded image, and facts that only its modality's expert knows."""
        if shown.seed is None:
            return [one_line(question) for question in self.checkpoints[0].questions[:6]]
        phantom = phantoms.draw(shown.seed)
        differ = [sign for sign in signs.known(16) if sign % 8]  # not the same in each modality
        asked = about_image(phantom)[::2] + about_signs(phantom, differ, 2)[:2]
        return [FACT, *(q.question for q in asked)]

    def restore(self, query: dict[str, str]) -> tuple[Shown, str, str, int]:
        """-> image, question and settings of a link, the usual ones where it has none."""
        q = self.usual | {key: query[key] for key in self.usual if key in query}
        seed = q["image"] if q["image"].isdecimal() else self.usual["image"]
        how = q["change"] if q["change"] in self.changes else OWN
        other = int(q["with"]) if q["with"] in map(str, range(len(self.checkpoints))) else 0
        return self.phantom(int(seed[:16])), q["question"], how, other

    def ask(
        self, shown: Shown, question: str, how: str, other: int
    ) -> Iterator[tuple[str, str, str]]:
        """-> the question with what is true, and both answers, as they are generated."""
        question, right, shown_truth = question.strip(), None, ""
        link = {"question": question, "change": how, "with": other}
        if shown.seed is not None:
            link |= {"image": shown.seed}
            right = answer(phantoms.draw(shown.seed), question)
            shown_truth = truth(shown.seed, question)
        address, is_embedded = "?" + urlencode(link), "image" in link
        head = self.html.asked(one_line(question), shown_truth, address, is_embedded)
        sides, asked = ["", ""], dict.fromkeys([(0, OWN), (other, how)])  # once, if they are one
        for i, (place, change) in enumerate(asked):
            c, pixels = self.checkpoints[place], shown.pixels[place]
            heading = f"{c.name}, {self.changes[change]}"
            try:
                if not question:
                    raise UserError("type a question first")
                for found in answers(c, pixels, shown.modality, question, change, self.max_new):
                    sides[i] = self.html.answer(heading, found.text, found.likelihood, "", None)
                    yield head, *sides
            except UserError as error:
                sides[i] = self.html.note(one_line(str(error)))
                yield head if i else "", *sides
                if i:
                    continue
                return
            verdict = "" if right is None else "right" if is_right(found.text, right) else "wrong"
            routes = describe(found.routes, pixels, c)
            sides[i] = self.html.answer(heading, found.text, found.likelihood, verdict, routes)
            yield head, *sides


def build(page: Page) -> Any:
    """The page as gradio's Blocks."""
    import gradio as gr

    names = [(f"{i + 1}: {c.name}", i) for i, c in enumerate(page.checkpoints)]
    with gr.Blocks(title="Med-MoE: see the experts work", analytics_enabled=False,
                   delete_cache=(600, 600)) as blocks:  # fmt: skip
        shown = gr.State()
        gr.HTML(page.html.header())
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = gr.HTML()
                modality = gr.Radio(MODALITIES, label="An embedded image")
                with gr.Row(equal_height=True):
                    seed = gr.Number(label="Its seed", precision=0, minimum=0, min_width=170)
                    following = gr.Button("Next image", min_width=90)
                file = gr.File(label="or a file of yours, which is not kept", height=140)
                fault = gr.HTML()
            with gr.Column(scale=3, min_width=300):
                question = gr.Textbox(label="Question", lines=1, max_lines=4)
                examples = gr.Dataset(components=[question], samples=[], layout="gallery",
                                      label="Questions that it understands")  # fmt: skip
                how = gr.Dropdown([(text, key) for key, text in page.changes.items()],
                                  label="Ask again, with the routing changed")  # fmt: skip
                other = gr.Dropdown(names, label="of the checkpoint", visible=len(names) > 1)
                ask = gr.Button("Ask", variant="primary")
                head = gr.HTML()
        with gr.Row():
            with gr.Column(min_width=300):
                left = gr.HTML()
            with gr.Column(min_width=300):
                right = gr.HTML()

        def show(found: Shown) -> list:
            samples = [[question] for question in page.examples(found)]
            return [found, page.image(found), found.modality, found.seed, None,
                    gr.Dataset(samples=samples), ""]  # fmt: skip

        def showing(find: Callable) -> Callable:
            def run(*values: Any) -> list:
                try:
                    return show(find(*values))
                except UserError as error:
                    kept = [gr.skip()] * 4
                    return [*kept, None, gr.skip(), page.html.note(one_line(str(error)))]

            return run

        def ask_page(*values: Any) -> Iterator[list]:
            before: tuple = (None,) * 3
            for parts in page.ask(*values):  # pictures are large: only what is new is sent
                yield [gr.skip() if a is b else a for a, b in zip(parts, before, strict=True)]
                before = parts

        def restore(request: gr.Request) -> list:
            found, *settings = page.restore(dict(request.query_params))
            return [*show(found), *settings]

        of_image = [shown, image, modality, seed, file, examples, fault]
        one_at_a_time = {"concurrency_id": "model", "concurrency_limit": 1}
        answering = {"fn": ask_page, "inputs": [shown, question, how, other],
                     "outputs": [head, left, right], "show_progress": "hidden"}  # fmt: skip
        answering |= one_at_a_time
        for event, inputs, find in (
            (modality.input, [seed, modality], page.phantom),
            (following.click, [seed, modality],
             lambda s, m: page.phantom(None if s is None else s + 1, m)),
            (seed.submit, [seed], page.phantom),
            (file.upload, [file], lambda path: page.file(Path(path))),
        ):  # fmt: skip
            event(showing(find), inputs, of_image, **one_at_a_time).then(**answering)
        examples.click(lambda sample: sample[0], examples, question).then(**answering)
        by_hand = [ask.click, question.submit, how.input, other.input]
        gr.on(by_hand, **answering, trigger_mode="always_last")  # not lost while it answers
        blocks.load(restore, None, [*of_image, question, how, other]).then(**answering)
    return blocks


def listen(port: int) -> socket.socket:
    """Raises UserError for a port that is taken."""
    try:
        return socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port}: {getattr(error, 'strerror', None) or error}") from error


def serve(page: Page, listening: socket.socket) -> None:
    """Until Ctrl-C."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    port = listening.getsockname()[1]
    sans, mono = gr.themes.Font("sans-serif"), gr.themes.Font("monospace")  # others are fetched
    app = gr.mount_gradio_app(
        FastAPI(), build(page), "/", server_name=HOST, server_port=port, footer_links=[],
        run_history=False, max_file_size=LARGEST, ssr_mode=False, show_error=False,
        theme=gr.themes.Default(primary_hue="blue", font=sans, font_mono=mono),
        css=page.html.css(),
    )  # fmt: skip
    print(f"http://{HOST}:{port} shows the page, until Ctrl-C. Not a medical device.", flush=True)
    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run([listening])


@cli.user_errors
def main(argv: list[str] | None = None) -> None:
    flags = cli.parse(DemoConfig, argv, "python -m lab.demo")
    if find_spec("gradio") is None:
        raise UserError("gradio is needed: pip install -r requirements-lab.txt")
    listening = listen(flags.port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing is left behind
    with tempfile.TemporaryDirectory(prefix="medmoe-demo-") as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        how = flags.device, flags.dtype, flags.kernels
        first, *others = flags.checkpoint
        checkpoints = [Checkpoint(first, *how, flags.router), *(Checkpoint(name, *how, None)
                                                                for name in others)]  # fmt: skip
        serve(Page(checkpoints, flags.max_new), listening)


if __name__ == "__main__":
    main()
