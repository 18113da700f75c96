"""`llama-adapter chat`: one answer, or a conversation."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llama_adapter.cli.experts import ExpertSettings
from llama_adapter.cli.models import MODEL
from llama_adapter.cli.numbers import MAX_FRAMES, MAX_NEW_TOKENS, MAX_TEMPERATURE, between
from llama_adapter.cli.output import one_line
from llama_adapter.cli.settings import Unread, given_options, refuse_unread
from llama_adapter.conversation import ImageRef
from llama_adapter.errors import ImageError, PromptError, ServingError
from llama_adapter.files import expanded

if TYPE_CHECKING:
    from llama_adapter.chat import ChatAnswer, ChatSession
    from llama_adapter.chat.remote import RemoteSession

_HELP = "/image FILE shows an image with the next question, /reset forgets, /quit leaves."


_Images = Annotated[
    list[Path] | None,
    typer.Option(
        "--image",
        help="An image to look at; may be repeated.",
        metavar="FILE",
        show_default=False,
    ),
]
_Video = Annotated[
    Path | None, typer.Option(help="A video to look at.", metavar="FILE", show_default=False)
]
_Frames = Annotated[
    int, typer.Option(help="Frames to take from the video.", callback=between(1, MAX_FRAMES))
]
_Context = Annotated[
    str | None, typer.Option(help="Text that the answer may draw on.", show_default=False)
]
_Prompt = Annotated[
    str | None,
    typer.Option(help="Answer this once and exit; otherwise a conversation.", show_default=False),
]
_MaxNewTokens = Annotated[
    int, typer.Option(help="Longest answer, in tokens.", callback=between(1, MAX_NEW_TOKENS))
]
_Temperature = Annotated[
    float,
    typer.Option(
        help="0: always the likeliest word; higher: more varied.",
        callback=between(0, MAX_TEMPERATURE),
    ),
]
_Seed = Annotated[
    int,
    typer.Option(help="Makes sampled answers repeatable.", callback=between(-(2**63), 2**63 - 1)),
]
_Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, …; by default the best there is.", show_default=False),
]
_Url = Annotated[
    str | None,
    typer.Option(
        help="A server to ask, such as http://127.0.0.1:8000, where MODEL is a name of its; its "
        "key is taken from LLAMA_ADAPTER_API_KEY.",
        show_default=False,
    ),
]
_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object; needs --prompt.")]


def chat(
    command: typer.Context,
    model: Annotated[str, MODEL],
    image: _Images = None,
    video: _Video = None,
    frames: _Frames = 8,
    *,
    experts: ExpertSettings,
    context: _Context = None,
    prompt: _Prompt = None,
    max_new_tokens: _MaxNewTokens = 256,
    temperature: _Temperature = 0.0,
    seed: _Seed = 0,
    device: _Device = None,
    url: _Url = None,
    as_json: _AsJson = False,
) -> None:
    """Ask a model about images, once or in a conversation.

    \b
    Examples:
      llama-adapter chat toy --image scene.png --prompt "What color is the star?"
      llama-adapter chat toy --image sign.png --expert ocr --prompt "What does the sign say?"
      llama-adapter chat toy --image scene.png --expert caption --expert search=notes/
      llama-adapter chat toy --video clip.mp4 --prompt "What happens?"
      llama-adapter chat runs/mine/adapter --prompt "Describe the image." --image a.jpg --json
      llama-adapter chat toy --url http://127.0.0.1:8000
    """
    from llama_adapter.cli.output import json_only

    if as_json and prompt is None:
        raise typer.BadParameter("--json answers once and needs --prompt")
    if prompt is not None and not prompt.strip():
        raise PromptError("--prompt is empty")
    refuse_unread(given_options(command), _unread(experts, video=video, url=url))
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    if url is None:
        experts.check(model)
        images = _shown(image or (), video, frames=frames)
    else:
        images = [*(image or ()), *([video] if video else ())]
    session: ChatSession | RemoteSession
    with json_only(as_json) as emit:
        if url is None:
            session = _open_session(
                model, experts=experts, context=context, device=device, seed=seed, **settings
            )
        else:
            session = _open_remote(url, model, experts=experts.expert, seed=seed, **settings)
        if prompt is None:
            _converse(session, images)
        elif as_json:
            emit(_as_json(session.ask(prompt, images=images)))
        else:
            _print_answer(session, prompt, images)


def _unread(experts: ExpertSettings, *, video: Path | None, url: str | None) -> Unread:
    if url is not None:
        local = ("context", "device", "frames", "expert_timeout", "expert_tokens", "expert_cache")
        yield frozenset(local), "a server has its own; it is of a model here"
    yield from experts.unread()
    if video is None:
        yield frozenset(("frames",)), "it needs --video"


def _shown(images: Sequence[Path], video: Path | None, *, frames: int) -> list[Any]:
    """What the first question looks at, so that a bad file is refused before a model is loaded."""
    shown: list[Any] = [_decoded(path) for path in images]
    if video is not None:
        shown.append(_frames_of(video, frames))
    return shown


def _decoded(path: Path) -> ImageRef:
    """An image that can be read; it is decoded here and nowhere else."""
    from llama_adapter.processing.images import load_image

    return ImageRef(source=load_image(path), name=str(path))


def _frames_of(path: Path, count: int) -> Any:
    """The video's frames, as one set of visual prompts."""
    from llama_adapter.processing.video import load_video

    video = load_video(path, frames=count)
    if video.note:
        typer.echo(one_line(f"note: {video.name}: {video.note}"), err=True)
    return video.as_image_ref()


def _open_session(
    model: str,
    *,
    experts: ExpertSettings,
    context: str | None,
    device: str | None,
    seed: int,
    **settings: Any,
) -> ChatSession:
    from llama_adapter.chat import ChatSession
    from llama_adapter.cli.models import load
    from llama_adapter.generation import GenerationSettings

    loaded, processor = load(model, device=device)
    return ChatSession(
        loaded,
        processor,
        experts=experts.open(model, loaded=loaded, processor=processor, device=device),
        context=context,
        settings=GenerationSettings(**settings),
        seed=seed,
    )


def _open_remote(
    url: str, model: str, *, experts: Sequence[str] | None, seed: int, **settings: Any
) -> RemoteSession:
    from llama_adapter.chat.remote import KEY_VARIABLE, RemoteSession
    from llama_adapter.generation import GenerationSettings

    return RemoteSession(
        url,
        model,
        key=os.environ.get(KEY_VARIABLE),
        experts=experts,
        settings=GenerationSettings(**settings),
        seed=seed,
    )


def _as_json(answer: ChatAnswer) -> dict[str, Any]:
    contexts: list[dict[str, Any]] = []
    if answer.contexts:  # experts import torch, which a session with a server does without
        from llama_adapter.experts import report_to_dict

        contexts = [report_to_dict(report) for report in answer.contexts]
    found: dict[str, Any] = {
        "answer": answer.text,
        "tokens": answer.tokens,
        "seconds": round(answer.seconds, 3),
        "contexts": contexts,
    }
    return found | ({"notes": list(answer.notes)} if answer.notes else {})


def _print_answer(session: ChatSession | RemoteSession, question: str, images: list[Any]) -> None:
    """Stream the answer to stdout; what experts reported goes to stderr."""
    from llama_adapter.cli.experts import show_reports

    for piece in session.stream(question, images=images):
        typer.echo(piece, nl=False)
    typer.echo()
    if session.last_answer is not None:
        show_reports(session.last_answer.contexts)


def _converse(session: ChatSession | RemoteSession, images: list[Any]) -> None:
    """Questions from stdin until it ends or the user leaves."""
    from llama_adapter.chat.remote import RemoteSession

    is_local = not isinstance(session, RemoteSession)
    if sys.stdin is not None and sys.stdin.isatty():
        typer.echo(_HELP, err=True)
    waiting = list(images)
    while (line := _read_line()) is not None:
        command, _, argument = line.strip().partition(" ")
        try:
            match command:
                case "":
                    continue
                case "/quit" | "/exit":
                    return
                case "/reset":
                    session.reset()
                    waiting = list(images)
                case "/image":
                    path = expanded(argument.strip())
                    decoded = _decoded(path)  # a bad file is refused at once
                    waiting.append(decoded if is_local else path)
                case _ if command.startswith("/"):
                    typer.echo(f"unknown command {one_line(command)}. {_HELP}", err=True)
                case _:
                    _print_answer(session, line.strip(), waiting)
                    waiting = []
        except (ImageError, PromptError, ServingError) as error:
            # the session is as it was: let the user try again
            typer.echo(f"error: {one_line(str(error))}", err=True)


def _read_line() -> str | None:
    if sys.stdin is None:  # closed: there is nothing to read, as at the end of a file
        return None
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
