"""Generated text as it comes: the text on stdout, what it took on stderr."""

from collections.abc import Iterable, Sequence

from formery.generate import Event, Generation
from formery.web.output import note
from formery.web.words import figures


def follow(
    events: Iterable[Event], prompts: Sequence[str], titles: bool, shown: bool = True
) -> list[Generation]:
    """Gathers the events of each prompt and prints them meanwhile, unless they are not to be `shown`.

    titles: say before each text which prompt it belongs to, where there are several.
    """
    results = [Generation(prompt) for prompt in prompts]
    for event in events:
        result = results[event.row]
        if shown and titles and not result.trace and len(prompts) > 1:
            end = " ".join(prompts[event.row].split())[-50:]
            print(f"--- prompt {event.row + 1} of {len(prompts)}: {end}")
        result.add(event)
        if shown:
            print(event.text, end="\n" if event.stop else "", flush=True)
        if event.stop:
            note(figures(result))
    return results
