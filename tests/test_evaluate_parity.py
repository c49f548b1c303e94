"""From images to values: against torch-fidelity, with random Inception weights in both."""

import pytest
import test_evaluate
import test_features_parity
from packages import import_or_skip

from dlc_jax import features
from dlc_jax.evaluation import names, reference, results
from dlc_jax.evaluation.images import open_set

pytestmark = pytest.mark.torch
torch = import_or_skip("torch")
inceptions = test_features_parity.inceptions
COUNT = 16  # of both, so that KID's one subset is all


@torch.no_grad()
def test_values_of_folders_are_those_of_torch_fidelity(inceptions, tmp_path, capsys):
    """Images of 64 pixels; both resize as TensorFlow 1 does."""
    path, fidelity, _ = inceptions
    fid, isc, kid, prc = (
        import_or_skip(f"torch_fidelity.metric_{name}") for name in ("fid", "isc", "kid", "prc")
    )
    images = [
        test_evaluate.drawn(COUNT, seed, side=64, shift=shift) for seed, shift in ((1, 60), (2, 0))
    ]
    theirs = []
    for part in images:
        batches = [
            fidelity(test_features_parity.planes(part[at : at + 10]))
            for at in range(0, 30, 10)
            if at < len(part)
        ]
        theirs.append([torch.cat(output) for output in zip(*batches)])
    (x, logits), (y, _) = theirs
    statistics = [fid.fid_features_to_statistics(part) for part in (x, y)]
    kernel = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None}
    kernel |= {"kid_kernel_poly_coef0": 1, "kid_subsets": 1, "kid_subset_size": COUNT}
    near = {"prc_neighborhood": 3, "prc_batch_size": 50, "save_cpu_ram": False}
    near = prc.prc_features_to_metric(x, y, verbose=False, **near)
    expected = {
        "fid": fid.fid_statistics_to_metric(*statistics, verbose=False)[
            "frechet_inception_distance"
        ],
        "is": isc.isc_features_to_metric(logits, 1)["inception_score_mean"],
        "kid": kid.kid_features_to_metric(x, y, rng_seed=0, verbose=False, **kernel)[
            "kernel_inception_distance_mean"
        ],
        "precision": near["precision"],
        "recall": near["recall"],
    }
    places = [test_evaluate.folder(tmp_path / name, part) for name, part in zip("ab", images)]
    extractor = features.load("inception", weights=path, protocol="adm")
    scorer = test_evaluate.one_device(batch=8, extractor=extractor)
    samples, compared = map(open_set, places)
    found = reference.of_images(compared, scorer, keep=False)
    kinds = names.parse("fid,is,kid,precision,recall", "inception")
    result = results.scored(samples, kinds, reference=found, scorer=scorer)
    got = test_evaluate.values(result)
    errors = {name: abs(got[name] / expected[name] - 1) for name in expected}
    with capsys.disabled():
        print("\n", {name: f"{value:.5g}" for name, value in got.items()}, errors)
    assert max(errors.values()) < 1e-3
