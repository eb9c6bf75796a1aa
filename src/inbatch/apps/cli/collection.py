"""Commands for a collection of images after training: explore, search."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from inbatch.apps.cli.app import (
    SEEDS,
    Device,
    ImageColumn,
    Index,
    Json,
    LabelColumn,
    Quiet,
    Split,
    app,
    emit_result,
    report_errors,
    requested_output,
)
from inbatch.apps.cli.own_code import OwnEncoder
from inbatch.apps.console import note, print_table, say, warn
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
        str, Option(metavar="auto|pca|tsne|umap|pacmap", help="Projection of the features to two dimensions.")
    ] = "auto",
    thumbnails: Annotated[
        int | None, Option(min=0, help="Side in pixels, 0 for none; default 64, and 32 for over 10,000 images.")
    ] = None,
    inside: Annotated[
        float,
        Option(
            metavar="MB", min=0, help="Largest size of thumbnails in the file; larger ones go to a folder next to it."
        ),
    ] = 30.0,
    index: Index = "exact",
    split: Split = None,
    seed: Annotated[int, Option(min=0, max=SEEDS, help="Seed of the projection and of the clusters.")] = 0,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    device: Device = "auto",
    quiet: Quiet = False,
    encoder: OwnEncoder = None,
    as_json: Json = False,
) -> None:
    """Write a map of the images as one HTML file that works offline: neighbours, clusters, outliers, duplicates."""
    with report_errors(as_json):
        from inbatch.apps.reports.explorer.explore import explore_features, is_features
        from inbatch.runtime.path_list import joined_paths

        other = more[0] if more and is_features(more[0]) else None
        data = joined_paths((more or [])[other is not None :]) or None
        path = requested_output(out)

        def compute() -> dict[str, Any]:
            return explore_features(
                features, data, other=other, out=path, projection=projection, thumbnails=thumbnails, inside=inside,
                index=index, seed=seed, split=split, device=device, quiet=quiet, image_column=image_column,
                label_column=label_column, notify=(lambda text: None) if quiet else note,
            )  # fmt: skip

        emit_result(compute, as_json, _show_map)


def _show_map(result: dict[str, Any]) -> None:
    duplicates, pictures = result["near_duplicates"], result["thumbnails"]
    say(f"Map:         {result['out']} ({result['bytes'] / 1e6:,.1f} MB)")
    if pictures and pictures["folder"]:
        say(f"Thumbnails:  {pictures['folder']} ({pictures['bytes'] / 1e6:,.1f} MB); keep it next to the map")
    elif not pictures:
        say("Thumbnails:  none" + ("" if result["features"][0].get("data") else ": pass DATA to show the images"))
    say(f"Images:      {result['images']:,}, {many(result['clusters'], 'cluster')}, by {result['projection']}")
    if duplicates and duplicates["groups"]:
        say(f"Duplicates:  {many(duplicates['images'], 'image')} in {many(duplicates['groups'], 'group')}")
    if "common_neighbours" in result:
        say(f"Neighbours:  {result['common_neighbours']:.0%} of the {result['neighbours']} nearest are common to both")
    say(f"Time:        {result['seconds']['total']:,.1f} s", "", f"Open {result['out']} in a browser.")


@app.command(
    epilog="Examples:\n\n  inbatch search runs/simclr-photos-1 cat.jpg\n\n"
    "  inbatch search runs/simclr-photos-1 new-photos --data ~/photos -k 5 -o hits.png\n\n"
    "  inbatch search runs/simclr-photos-1 cat.jpg --features photos.npz --json\n\n"
    "  inbatch search runs/simclr-photos-1 ~/photos/cat.jpg --exclude-self --index approximate",
)
def search(
    run: Annotated[Path, Argument(metavar="RUN", help="Run directory or encoder's folder; it embeds the queries.")],
    images: Annotated[list[str], Argument(metavar="IMAGE...", help="Images to search for, or folders of them.")],
    data: Annotated[list[str] | None, Option(help="Images to search in; default: those of the run.")] = None,
    k: Annotated[int, Option("-k", min=1, help="Nearest images of each query.")] = 20,
    features: Annotated[
        Path | None, Option(metavar="FILE", help="Features to search in, of inbatch embed RUN; --data: their images.")
    ] = None,
    index: Index = "exact",
    exclude_self: Annotated[bool, Option("--exclude-self", help="Leave out the query if it is searched in.")] = False,
    split: Split = None,
    out: Annotated[Path | None, Option("--out", "-o", metavar="PNG", help="Also draw the nearest images.")] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    device: Device = "auto",
    quiet: Quiet = False,
    encoder: OwnEncoder = None,
    as_json: Json = False,
) -> None:
    """List the images that are nearest to given images, by the cosine similarity of features.

    The features of RUN are kept in RUN/features and computed again only if images or encoder change.
    """
    with report_errors(as_json):
        from inbatch.apps.collection.search import search_images
        from inbatch.runtime.path_list import joined_paths

        picture = None if out is None else requested_output(out)

        def compute() -> dict[str, Any]:
            result = search_images(
                run, images, joined_paths(data) or None, k=k, features=features, index=index, exclude_self=exclude_self,
                split=split, out=picture, device=device, quiet=quiet, image_column=image_column,
                label_column=label_column,
            )  # fmt: skip
            for text in () if quiet else result["notes"]:
                note(text)
            for text in result["unreadable_queries"]:
                warn(text)
            return result

        emit_result(compute, as_json, _show_neighbours)


def _show_neighbours(result: dict[str, Any]) -> None:
    several, queries = len(result["queries"]) > 1, result["queries"]
    rows = [
        (query["path"] if near["rank"] == 1 else "", str(near["rank"]), f"{near['similarity']:.4f}", near["path"],
         near["class"] or "", near["split"], "itself" if near["itself"] else "")
        for query in queries
        for near in query["neighbours"]
    ]  # fmt: skip
    headings = ("query", "rank", "similarity", "path", "class", "split", "")
    kept = [i for i in range(len(headings)) if (i or several) and (headings[i] or any(row[i] for row in rows))]
    print_table([headings[i] for i in kept], [[row[i] for i in kept] for row in rows])
    say("", f"Nearest of {many(result['images'], 'image')} by cosine similarity ({result['index']})")
    if result["out"]:
        say(f"Picture: {result['out']}")
