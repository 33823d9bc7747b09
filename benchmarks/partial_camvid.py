"""Labels as two teams would have made them of CamVid, each of other classes:
python benchmarks/partial_camvid.py $CAMVID FOLDER

Writes for each team masks in which the other team's classes are `background` (index 11; void becomes 255),
and an instances JSON that lists every category but holds the team's objects alone, as annotation tools export
them; and complete validation masks with void 255.
"""

import argparse
import json
import sys
from pathlib import Path

from multitask_kd.cli import run_tool

TEAMS = {  # mask indices that each team labels; detection categories are among them
    "a": ("Sky", "Road", "Tree", "Fence", "Car", "Bicyclist"),
    "b": ("Building", "Pole", "Pavement", "SignSymbol", "Pedestrian"),
}
BACKGROUND, VOID = 11, 255


def main(args: argparse.Namespace) -> int:
    import numpy as np
    from PIL import Image

    source, target = Path(args.source), Path(args.folder)
    names = {int(index): name for index, name in json.loads((source / "classes.json").read_text()).items()}
    instances = json.loads((source / "annotations/instances_train.json").read_text())
    category = {entry["id"]: entry["name"] for entry in instances["categories"]}
    tables = {"val": {index: index for index in range(BACKGROUND)}}
    for team, own in TEAMS.items():
        tables[team] = {i: i if names[i] in own else BACKGROUND for i in range(BACKGROUND)}
        kept = [entry for entry in instances["annotations"] if category[entry["category_id"]] in own]
        target.mkdir(parents=True, exist_ok=True)
        (target / f"instances_{team}.json").write_text(json.dumps({**instances, "annotations": kept}))
    for name, table in tables.items():
        values = np.full(256, VOID, np.uint8)
        values[list(table)] = list(table.values())
        (target / name).mkdir(exist_ok=True)
        for path in sorted((source / "masks" / ("val" if name == "val" else "train")).glob("*.png")):
            Image.fromarray(values[np.array(Image.open(path))]).save(target / name / path.name)
    print(f"written: {target}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder of CamVid in its 11-class form")
    parser.add_argument("folder", help="where the two teams' labels are written")
    sys.exit(run_tool(main, parser))
