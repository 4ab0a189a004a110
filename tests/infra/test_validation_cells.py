"""Laws of the names of validation's numbers: what is written is what is read."""

from hypothesis import given
from hypothesis import strategies as st

from infra.validation_cells import DOCUMENTS, KEPT, Cell, cell_of, cells_of, rows_name, validation_losses

CELLS = (
    st.builds(
        Cell,
        of=st.sampled_from(["video", "image", "video text_to_video", KEPT]),
        given=st.sampled_from(DOCUMENTS),
        quantile=st.none() | st.sampled_from([0.1, 0.35, 0.9, 1.0]),
        is_gain=st.just(True),
        is_error=st.booleans(),
    )
    | st.builds(Cell, of=st.just("video"), given=st.sampled_from(DOCUMENTS), quantile=st.none() | st.just(0.65))
    | st.builds(
        Cell,
        of=st.just("video subject_driven"),
        given=st.sampled_from(["own", "none"]),
        quantile=st.none() | st.just(0.65),
        is_gain=st.booleans(),
        axis=st.just("references"),
    )
)


@given(CELLS)
def test_a_name_says_all_of_its_cell(cell: Cell) -> None:
    assert cell_of(cell.name) == cell


def test_names_are_plain() -> None:
    cell = Cell("video", "none", 0.9, is_gain=True, is_error=True)
    assert cell.name == "val/video none - right q0.9 error"
    assert Cell("video text_to_video", "right").name == "val/video text_to_video documents right"
    own = Cell("video subject_driven", "own", axis="references")
    assert own.name == "val/video subject_driven references own"


def test_other_numbers_are_no_cells() -> None:
    record = {"loss": 1.0, "val/held_out": 1, rows_name("video"): 3, "val/video documents odd": 1.0}
    record |= {"val/video references right": 1.0, "val/video right - own": 1.0, "val/video none - odd": 1.0}
    assert cells_of(record | {"val/video documents none": "hostile"}) == {}


def test_losses_of_media_over_all_levels_are_drawn() -> None:
    names = ["video text_to_video documents none", "video documents none", "video documents none q0.9"]
    names += ["image documents none", "video none - right", "video documents right", f"{KEPT} documents right"]
    names += ["video subject_driven references own"]
    record = {f"val/{name}": 0.5 for name in names}
    assert validation_losses([{}, record]) == [
        "val/video documents right",
        "val/video documents none",
        "val/image documents none",
        "val/stage1 video documents right",
    ]
