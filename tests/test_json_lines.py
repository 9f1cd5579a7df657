"""Files of one JSON object a line."""

from utils.json_lines import add_line, read_lines


def test_a_torn_row_takes_no_other_with_it(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert read_lines(file) == []
    add_line(file, {"seed": 0})
    add_line(file, {"seed": 1, "name": "ü"})
    whole = file.read_bytes()
    assert whole.count(b"\n") == 2 and read_lines(file) == [{"seed": 0}, {"seed": 1, "name": "ü"}]
    file.write_bytes(whole[:-4])
    assert read_lines(file) == [{"seed": 0}]
    add_line(file, {"seed": 2})
    assert read_lines(file) == [{"seed": 0}, {"seed": 2}]
