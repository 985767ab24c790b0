"""World of the miniature: disjoint parts, true captions, measurable quality."""

import torch

from miniature import evaluators, world
from miniature.world import Part


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_parts_are_disjoint_and_cover_the_world() -> None:
    parts = [set(map(tuple, world.combinations(part).tolist())) for part in Part]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 6 * 11 * 10


def test_every_part_has_every_shape_and_colour() -> None:
    for part in Part:
        rows = world.combinations(part)
        assert [len(rows[:, i].unique()) for i in range(3)] == [6, 11, 11]


def test_scenes_come_from_the_requested_part() -> None:
    scenes = world.sample_scenes(500, Part.HELD_OUT, stream())
    allowed = set(map(tuple, world.combinations(Part.HELD_OUT).tolist()))
    assert set(map(tuple, scenes.content[:, :3].tolist())) <= allowed


def test_same_random_stream_draws_the_same_images() -> None:
    images = [world.draw(world.sample_scenes(8, Part.EVALUATORS, rng), rng) for rng in (stream(3), stream(3))]
    assert torch.equal(*images)


def test_caption_states_attributes_of_its_scene_only() -> None:
    scenes = world.sample_scenes(200, Part.EVALUATORS, stream(1))
    captions = world.describe(scenes, stream(2), quality_share=0.5)
    for text, row, stated in zip(
        captions.text, scenes.content.tolist(), captions.stated.tolist(), strict=True
    ):
        words = text.replace(",", "").split()
        assert world.SHAPES[row[0]] in words
        assert world.COLOURS[row[1]] in words
        assert world.COLOURS[row[2]] in words
        assert (world.SIZES[row[3]] in words) == stated[3]
        assert (world.TEXTURES[row[4]] in words) == stated[4]


def test_caption_is_true_of_its_scene_and_false_of_a_changed_one() -> None:
    scenes = world.sample_scenes(300, Part.EVALUATORS, stream(4))
    captions = world.describe(scenes, stream(5), quality_share=0.5)
    assert world.is_true_of(captions, scenes, scenes).diagonal().all()
    changed = scenes.replace(shape=(scenes.shape + 1) % 6)
    assert not world.is_true_of(captions, scenes, changed).diagonal().any()


def test_quality_word_is_false_of_the_opposite_quality() -> None:
    scenes = world.perfect(world.sample_scenes(300, Part.EVALUATORS, stream(6)))
    captions = world.describe(scenes, stream(7), quality_share=1.0)
    full = torch.ones(300)
    ruined = scenes.replace(
        blur_px=full * world.MAX_BLUR_PX, fade=full * world.MAX_FADE, noise=full * world.MAX_NOISE
    )
    assert not world.is_true_of(captions, scenes, ruined).diagonal().any()


def test_better_quality_raises_the_aesthetic_and_both_utilities() -> None:
    scenes = world.sample_scenes(200, Part.EVALUATORS, stream(8))
    truth = torch.ones(len(scenes))
    better = world.perfect(scenes)
    assert (world.aesthetic(better) >= world.aesthetic(scenes)).all()
    assert (world.pick_utility(better, truth) >= world.pick_utility(scenes, truth)).all()
    assert (world.hps_utility(better, truth) >= world.hps_utility(scenes, truth)).all()


def test_aesthetic_is_between_1_and_10() -> None:
    values = world.aesthetic(world.sample_scenes(2000, Part.EVALUATORS, stream(9)))
    assert values.min() >= 1
    assert values.max() <= 10


def test_alternative_scenes_stay_in_their_part_of_the_world() -> None:
    for part in Part:
        other = evaluators.sample_alternatives(world.sample_scenes(3000, part, stream(10)), part, stream(11))
        assert world.is_in_part(other.shape, other.figure, other.background, part).all()
        assert (other.figure != other.background).all()
