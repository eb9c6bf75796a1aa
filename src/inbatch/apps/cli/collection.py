"""Commands for a collection of images after training: explore."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from inbatch.apps.cli.app import (
    SEEDS,
    Device,
    ImageColumn,
    Json,
    LabelColumn,
    Quiet,
    app,
    deliver,
    reported,
    requested_output,
)
from inbatch.apps.console import note, say
from inbatch.errors import many


@app.command(
    epilog="Examples:\n\n  inbatch explore runs/simclr-photos-1 -o map.html\n\n"
    "  inbatch explore runs/simclr-photos-1 ~/other-photos -o map.html\n\n"
    "  inbatch explore runs/simclr-photos-1 runs/vicreg-photos-1 -o both.html\n\n"
    "  inbatch explore features.npz ~/photos --projection pca -o map.html",
)
def explore(
    features: Annotated[
        str,
        Argument(metavar="RUN|FEATURES", help="A run, an encoder's folder, or a file of inbatch embed."),
    ],
    more: Annotated[
        list[str] | None,
        Argument(metavar="[RUN|FEATURES] [DATA]...", help="A second run for two maps side by side; the images."),
    ] = None,
    out: Annotated[Path, Option("--out", "-o", help="HTML file to write; replaced if it exists.")] = Path("map.html"),
    projection: Annotated[
        str, Option(metavar="auto|pca|tsne|umap|pacmap", help="How features become two coordinates.")
    ] = "auto",
    thumbnails: Annotated[
        int | None, Option(min=0, help="Side in pixels, 0 for none; default 64, and 32 for over 10,000 images.")
    ] = None,
    inside: Annotated[
        float, Option(metavar="MB", min=0, help="Thumbnails of more megabytes are written to a folder beside the file.")
    ] = 30.0,
    split: Annotated[str | None, Option(help="The only split to show; default: every image.")] = None,
    seed: Annotated[int, Option(min=0, max=SEEDS, help="Seed of the projection and of the clusters.")] = 0,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a map of the images as one HTML file that works offline: neighbours, clusters, outliers, duplicates."""
    with reported(as_json):
        from inbatch.apps.reports.explorer.explore import explore_features, is_features
        from inbatch.runtime.path_list import joined_paths

        other = more[0] if more and is_features(more[0]) else None
        data = joined_paths((more or [])[other is not None :]) or None
        path = requested_output(out)

        def compute() -> dict[str, Any]:
            return explore_features(
                features, data, other=other, out=path, projection=projection, thumbnails=thumbnails, inside=inside,
                seed=seed, split=split, device=device, quiet=quiet, image_column=image_column,
                label_column=label_column, notify=(lambda text: None) if quiet else note,
            )  # fmt: skip

        deliver(compute, as_json, _show_map)


def _show_map(result: dict[str, Any]) -> None:
    duplicates, pictures = result["near_duplicates"], result["thumbnails"]
    say(f"Map:         {result['out']} ({result['bytes'] / 1e6:,.1f} MB)")
    if pictures and pictures["folder"]:
        say(f"Thumbnails:  {pictures['folder']} ({pictures['bytes'] / 1e6:,.1f} MB); keep it beside the map")
    elif not pictures:
        say("Thumbnails:  none" + ("" if result["features"][0].get("data") else ": pass DATA to show the images"))
    say(f"Images:      {result['images']:,}, {many(result['clusters'], 'cluster')}, by {result['projection']}")
    if duplicates["groups"]:
        say(f"Duplicates:  {many(duplicates['images'], 'image')} in {many(duplicates['groups'], 'group')}")
    if "common_neighbours" in result:
        say(f"Neighbours:  {result['common_neighbours']:.0%} of the {result['neighbours']} nearest are common to both")
    say(f"Time:        {result['seconds']['total']:,.1f} s", "", f"Open {result['out']} in a browser.")
