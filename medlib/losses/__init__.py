"""The losses: pure functions of tensors, one file per paper, and files that papers share.

``contrastive``   InfoNCE, SimCLR, positional and partition contrast, and the checks every loss starts with
``segmentation``  cross-entropy and Dice on labelled pixels
``consistency``   mean teacher and the other semi-supervised baselines; ``gcl`` and ``mcnet`` are of IDEAL's rivals
``coral``         relational and ordinal anatomical learning
``ideal``         dense matches, local contrast, cross-consistency
``mona``          instance discrimination, anatomical contrast, equivariance, nearest neighbours, and their samplers
``dacl``          density of features, positiveness weights, density-guided contrast, and their samplers
``dvcl``          entropy selection, exact neighbours and outsiders, distance-aware voxel contrast

Every loss returns a 0-d tensor, computes in at least float32 whatever it is handed, and is finite for any finite input.
When there is nothing to compare it is exactly 0 and still attached to its input, so ``backward()`` runs. Wrong shapes,
or a temperature that is not positive, raise ``ValueError``. A loss that one of the five papers defines has its slow,
literal definition beside it, named ``<loss>_by_definition``: the notebooks print it, the tests compare with it.
"""
