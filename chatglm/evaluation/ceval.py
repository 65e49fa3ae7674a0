"""C-Eval as evaluation/evaluate_ceval.py of ChatGLM2-6B runs it: think first, then the scores of A, B, C, D decide."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from chatglm.evaluation.files import Row, csv_rows, existing_folder, hub_rows, json_lines, letter_of, text_of
from chatglm.evaluation.question import Benchmark, Published, Question, chinese_extraction, with_choices

LETTERS = "ABCD"
GROUPS = {
    "STEM": "computer_network operating_system computer_architecture college_programming college_physics "
    "college_chemistry advanced_mathematics probability_and_statistics discrete_mathematics electrical_engineer "
    "metrology_engineer high_school_mathematics high_school_physics high_school_chemistry high_school_biology "
    "middle_school_mathematics middle_school_biology middle_school_physics middle_school_chemistry "
    "veterinary_medicine".split(),
    "Social Science": "college_economics business_administration marxism mao_zedong_thought education_science "
    "teacher_qualification high_school_politics high_school_geography middle_school_politics "
    "middle_school_geography".split(),
    "Humanities": "modern_chinese_history ideological_and_moral_cultivation logic law "
    "chinese_language_and_literature art_studies professional_tour_guide legal_professional high_school_chinese "
    "high_school_history middle_school_history".split(),
    "Other": "civil_servant sports_science plant_protection basic_medicine clinical_medicine urban_and_rural_planner "
    "accountant fire_engineer environmental_impact_assessment_engineer tax_accountant physician".split(),
}
GROUP_OF = {subject: group for group, subjects in GROUPS.items() for subject in subjects}
THINK = "让我们一步一步思考。"  # for questions that were not prepared for ChatGLM2


class CEval(Benchmark):
    """Chinese exams in 52 subjects, four choices each; the validation split has 1,346 questions.

    The data are the folder that was published with ChatGLM2-6B (`val/GROUP/SUBJECT.jsonl`, fields
    inputs_pretokenized and label), or C-Eval's own (`val/SUBJECT_val.csv`, fields question, A, B, C, D, answer),
    or ceval/ceval-exam on the Hub.
    """

    name = "ceval"
    longest_prompt = 2048  # as published, in both passes
    published = (
        Published("ChatGLM2-6B, bf16, validation", 53.57),
        Published("ChatGLM2-6B, int4, validation", 50.30),
        Published("ChatGLM2-6B, test", 50.1),
        Published("ChatGLM-6B, test", 38.9),
    )

    def questions(self, data: Path | None) -> list[Question]:
        if data is None:
            return list(self._of_the_hub())
        folder = existing_folder(data)
        folder = folder / "val" if (folder / "val").is_dir() else folder
        files = sorted(folder.rglob("*.jsonl")) or sorted(folder.glob("*_val.csv"))
        if not files:
            raise OSError(
                f"{folder} holds neither .jsonl files, as published with ChatGLM2-6B, nor *_val.csv files, as C-Eval "
                "has them; give the folder that has them, or the one around val."
            )
        return [question for file in files for question in self._of_file(folder, file)]

    def _of_file(self, folder: Path, file: Path) -> Iterator[Question]:
        name = file.relative_to(folder)
        rows = json_lines(file) if file.suffix == ".jsonl" else csv_rows(file)
        subject = file.stem.removesuffix("_val")
        group = " / ".join(name.parts[:-1]) or GROUP_OF.get(subject, "")
        for number, row in enumerate(rows, 1):
            make = prepared if file.suffix == ".jsonl" else unprepared
            yield make(row, f"{name.as_posix()}:{number}", subject, group)

    def _of_the_hub(self) -> Iterator[Question]:
        for subject, group in GROUP_OF.items():
            for number, row in enumerate(hub_rows("ceval/ceval-exam", subject, "val"), 1):
                yield unprepared(row, f"{subject}:{number}", subject, group)


def prepared(row: Row, place: str, subject: str, group: str = "") -> Question:
    """A line of the data that were published with ChatGLM2-6B."""
    return Question(
        place,
        subject,
        text_of(row, "inputs_pretokenized"),
        letter_of(row, "label", LETTERS),
        LETTERS,
        chinese_extraction(LETTERS),
        group,
    )


def unprepared(row: Row, place: str, subject: str, group: str) -> Question:
    """A row of C-Eval itself."""
    choices = [text_of(row, letter) for letter in LETTERS]
    text = with_choices(text_of(row, "question"), choices) + "\n" + THINK
    answer = letter_of(row, "answer", LETTERS)
    return Question(place, subject, text, answer, LETTERS, chinese_extraction(LETTERS), group)
