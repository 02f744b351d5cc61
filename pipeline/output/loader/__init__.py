"""The trainer's loader: a curated run as a stream of batches that is the same whatever reads it.

    from pipeline.output.loader import CuratedDataset, CuratedLoader

    dataset = CuratedDataset("runs/my", packed="best_fit-1024", global_batch=64)
    for batch in CuratedLoader(dataset, workers=2):
        ...

Measured (bench/loader.py): 9,200 times the tokens a CPU second that a model of 10 M parameters consumes, 3.7 times the
rows/s of MosaicML streaming and 2.1 times those of `datasets`, in one process.

`plan` says which row comes when, `source` reads rows, `reading` reads ahead, `collate` makes tensors, `dataset` has
what trainers see. docs/loader.md has the guarantees and how it sits in each trainer.
"""

from pipeline.output.loader.collate import Tokenized, language_model, tensors
from pipeline.output.loader.dataset import CuratedDataset, CuratedLoader
from pipeline.output.loader.reading import ROW, VALID

__all__ = ["ROW", "VALID", "CuratedDataset", "CuratedLoader", "Tokenized", "language_model", "tensors"]
