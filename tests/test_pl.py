"""Pictures of an AnnData: axes in, axes out, labelled, not blank, and nothing left behind in pyplot or the AnnData."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cellplane import pl
from cellplane.data.config import KnockoutConfig, SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData
from cellplane.errors import ColumnError, DataError


@pytest.fixture(scope="module")
def cells() -> AnnData:
    """Labelled cells with predictions of which a quarter are wrong, a confidence, an embedding and its UMAP."""
    data = simulate(SimulateConfig(n_cells=120, n_genes=40, spatial=True, mean_counts=200))
    generator = np.random.default_rng(0)
    truth = data.obs["cell_type"].astype(str).to_numpy().astype(object)
    wrong = generator.random(data.n_obs) < 0.25
    data.obs["cellplm_cell_type"] = pd.Categorical(np.where(wrong, "type_0", truth))
    data.obs["cellplm_confidence"] = np.where(wrong, 0.5, 0.9)
    data.obs["cell_type"] = np.where(np.arange(data.n_obs) % 20 == 0, "NA", truth)
    data.obsm["X_umap"] = generator.normal(size=(data.n_obs, 2))
    return data


@pytest.fixture(scope="module")
def imputed(cells: AnnData) -> AnnData:
    """The last ten genes of the cells, half truth and half noise; one was refused."""
    part = cells[:, -10:].copy()
    values = part.X.toarray()
    noise = np.random.default_rng(0).permutation(values)
    values = 0.5 * values + 0.5 * noise
    values[:, 0] = np.nan
    return AnnData(X=values.astype(np.float32), obs=part.obs[[]], var=part.var[[]])


@pytest.fixture(scope="module")
def screen() -> AnnData:
    """Control and perturbed cells."""
    return simulate(SimulateConfig(n_cells=400, n_genes=40, mean_counts=300, knockouts=KnockoutConfig(n_genes=2, n_targets=5)))


def answer_to(screen: AnnData) -> AnnData:
    """What a perfect `PerturbationPipeline.predict` would say of half the change."""
    logs = np.log1p(screen.X.toarray())
    names = [name for name in screen.obs["perturbation"].cat.categories if name != "control"]
    control = logs[(screen.obs["perturbation"] == "control").to_numpy()].mean(0)
    change = np.stack([logs[(screen.obs["perturbation"] == name).to_numpy()].mean(0) - control for name in names])
    return AnnData(X=change, obs=pd.DataFrame({"perturbation": names}, index=names), var=screen.var[[]], layers={"delta": 0.5 * change})


def assert_drawn(axes: Axes, size: int = 20) -> None:
    """The picture has ink within its axes and a name on both of them, and none of it is cut off."""
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    pixels = drawn(figure)
    assert pixels.std() > size / 1000
    borders = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    assert min(border.min() for border in borders) > 0.99, "something touches the edge of the picture"


def drawn(figure: Figure) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255


PICTURES = {
    "labels": lambda cells, ax: pl.umap(cells, "cell_type", ax=ax),
    "batch": lambda cells, ax: pl.umap(cells, "batch", ax=ax),
    "confidence": lambda cells, ax: pl.umap(cells, "cellplm_confidence", ax=ax),
    "confusion": lambda cells, ax: pl.confusion(cells, ax=ax),
    "f1": lambda cells, ax: pl.per_class_f1(cells, predicted_keys=("cellplm_cell_type", "batch"), ax=ax),
    "reliability": lambda cells, ax: pl.reliability(cells, ax=ax),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_drawn_with_named_axes_and_changes_nothing(cells, name):
    before = cells.copy()
    assert_drawn(PICTURES[name](cells, None))
    assert list(cells.obs) == list(before.obs)
    assert set(cells.obsm) == set(before.obsm)
    np.testing.assert_array_equal(cells.X.toarray(), before.X.toarray())


@pytest.mark.parametrize("name", PICTURES)
def test_given_axes_are_filled_and_returned(cells, name):
    figure = Figure(figsize=(14, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    assert PICTURES[name](cells, right) is right
    assert right.has_data()
    assert not left.has_data()


def test_numbers_get_a_scale_and_labels_a_legend(cells):
    assert len(pl.umap(cells, "cellplm_confidence").figure.axes) == 2
    assert pl.umap(cells, "cellplm_confidence").get_legend() is None
    texts = [text.get_text() for text in pl.umap(cells, "cell_type").get_legend().get_texts()]
    assert [text.split(" (")[0] for text in texts] == ["no label", "1  type_0", "2  type_1", "3  type_2", "4  type_3"]


def test_cells_without_a_label_do_not_count(cells):
    labelled = (cells.obs["cell_type"] != "NA").sum()
    names = [text.get_text() for text in pl.confusion(cells).get_yticklabels()]
    assert sum(int(name.split("n=")[1].rstrip(")")) for name in names) == labelled
    assert f"{labelled} cells" in pl.reliability(cells).get_title()


def test_without_a_umap_one_is_made_of_the_embedding(cells, monkeypatch):
    asked = []
    monkeypatch.setattr(pl, "umap_layout", lambda points, seed: asked.append((points.shape, seed)) or points[:, :2])
    data = cells.copy()
    data.obsm["X_cellplm"] = np.random.default_rng(0).normal(size=(data.n_obs, 7))
    pl.umap(data, "batch")
    assert asked == [], "X_umap is there"
    pl.umap(data, "batch", use_rep="X_cellplm", seed=3)
    del data.obsm["X_umap"]
    pl.umap(data, "batch")
    assert asked == [((data.n_obs, 7), 3), ((data.n_obs, 7), 0)]


def test_the_better_imputation_stands_higher_and_refused_genes_are_left_out(cells, imputed):
    perfect = AnnData(X=cells[:, -10:].X.toarray(), obs=cells.obs[[]], var=cells[:, -10:].var[[]])
    axes = pl.gene_pearson(cells, {"half": imputed, "perfect": perfect})
    assert_drawn(axes)
    half, whole = (np.ma.filled(points.get_offsets(), np.nan)[:, 1] for points in axes.collections)
    assert len(half) == 9
    assert np.all(whole > half - 1e-9)
    assert np.all(whole > 0.99)


def test_a_gene_in_tissue_has_three_panels_on_one_scale(cells, imputed):
    gene = str(imputed.var_names[3])
    panels = pl.spatial(cells, imputed, gene)
    assert [panel.get_title() for panel in panels] == [f"{gene}: {name}" for name in ("truth", "prediction", "prediction - truth")]
    for panel in panels:
        assert_drawn(panel)
    truth, prediction, error = (panel.collections[0] for panel in panels)
    assert truth.get_clim() == prediction.get_clim()
    np.testing.assert_allclose(error.get_array(), prediction.get_array() - truth.get_array(), atol=1e-6)
    assert error.get_clim()[0] == -error.get_clim()[1]


def test_a_change_names_the_most_differential_genes(screen):
    answer = answer_to(screen)
    name = str(answer.obs_names[0])
    axes = pl.change(screen, answer, name)
    assert_drawn(axes)
    named = {text.get_text() for text in axes.texts}
    assert len(named) == pl.DIFFERENTIAL
    assert name in named, "a knock-out's own gene falls most"
    assert "0.9" in axes.get_title() or "1.0" in axes.get_title()


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda cells, imputed: pl.umap(cells, "cell_typ"), "did you mean 'cell_type'"),
        (lambda cells, imputed: pl.umap(cells, "batch", use_rep="X_pca"), "no 'X_pca' in obsm"),
        (lambda cells, imputed: pl.confusion(cells, predicted_key="nothing"), "no 'nothing' in obs"),
        (lambda cells, imputed: pl.reliability(cells, confidence_key="sure"), "no 'sure' in obs"),
        (lambda cells, imputed: pl.gene_pearson(cells[5:], imputed), "same cells in the same order"),
        (lambda cells, imputed: pl.gene_pearson(cells[:, :20], imputed), "none of the imputed genes"),
        (lambda cells, imputed: pl.spatial(cells, imputed, "GENE0001"), "was not both measured and imputed"),
        (lambda cells, imputed: pl.spatial(cells, imputed, str(imputed.var_names[2]), spatial_key="xy"), "no 'xy' in obsm"),
        (lambda cells, imputed: pl.spatial(cells, imputed, str(imputed.var_names[2]), axes=[]), "three axes"),
    ],
)
def test_what_is_missing_is_named(cells, imputed, draw, words):
    with pytest.raises((ColumnError, DataError), match=words):
        draw(cells, imputed)


def test_cells_without_any_label_are_an_error(cells):
    data = cells.copy()
    data.obs["cell_type"] = "NA"
    with pytest.raises(DataError, match="no cell has both"):
        pl.confusion(data)


def test_a_perturbation_that_was_not_predicted_is_named(screen):
    with pytest.raises(ColumnError, match="was not predicted"):
        pl.change(screen, answer_to(screen), "nothing")


def test_pyplot_is_never_touched():
    code = (
        "import sys, cellplane, numpy as np, pandas as pd, anndata\n"
        "obs = pd.DataFrame({'t': ['a', 'b'] * 4}, index=[str(n) for n in range(8)])\n"
        "data = anndata.AnnData(np.ones((8, 3)), obs=obs, obsm={'X_umap': np.eye(8)[:, :2]})\n"
        "cellplane.pl.umap(data, 't').figure.canvas.draw()\n"
        "print('matplotlib.pyplot' in sys.modules, 'umap' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
