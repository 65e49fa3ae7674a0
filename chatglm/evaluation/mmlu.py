"""MMLU: English questions in 57 subjects; zero-shot chain of thought, then the scores of A, B, C, D decide."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from chatglm.evaluation.files import Row, csv_rows, existing_folder, hub_rows, letter_of, text_of
from chatglm.evaluation.question import Benchmark, Published, Question, english_extraction, with_choices

LETTERS = "ABCD"
THINK = "Let's think step by step."  # Kojima et al. 2022, arXiv 2205.11916
GROUPS = {
    "STEM": "abstract_algebra astronomy college_biology college_chemistry college_computer_science college_mathematics "
    "college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics "
    "high_school_biology high_school_chemistry high_school_computer_science high_school_mathematics "
    "high_school_physics high_school_statistics machine_learning".split(),
    "Social Sciences": "econometrics high_school_geography high_school_government_and_politics "
    "high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality "
    "professional_psychology public_relations security_studies sociology us_foreign_policy".split(),
    "Humanities": "formal_logic high_school_european_history high_school_us_history high_school_world_history "
    "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory "
    "professional_law world_religions".split(),
    "Others": "anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management "
    "marketing medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology".split(),
}
GROUP_OF = {subject: group for group, subjects in GROUPS.items() for subject in subjects}


class MMLU(Benchmark):
    """The data are MMLU's own (`test/SUBJECT_test.csv`: question, four choices, letter), or cais/mmlu on the Hub."""

    name = "mmlu"
    longest_prompt = 2048
    published = (
        Published("ChatGLM2-6B, bf16", 45.47),
        Published("ChatGLM2-6B, int4", 43.13),
        Published("ChatGLM2-6B base, few-shot", 47.86),
        Published("ChatGLM-6B", 40.63),
    )

    def questions(self, data: Path | None) -> list[Question]:
        if data is None:
            return list(self._of_the_hub())
        folder = existing_folder(data)
        folder = folder / "test" if (folder / "test").is_dir() else folder
        files = sorted(folder.glob("*_test.csv"))
        if not files:
            raise OSError(
                f"{folder} holds no *_test.csv files; give the folder data of MMLU, or the test folder in it."
            )
        return [question for file in files for question in self._of_file(file)]

    def _of_file(self, file: Path) -> Iterator[Question]:
        subject = file.stem.removesuffix("_test")
        for number, row in enumerate(csv_rows(file, ["question", *LETTERS, "answer"]), 1):
            choices = [row[1][letter] for letter in LETTERS]  # some are empty in the published files
            yield self._question(row, f"{file.name}:{number}", subject, choices)

    def _of_the_hub(self) -> Iterator[Question]:
        for number, row in enumerate(hub_rows("cais/mmlu", "all", "test"), 1):
            yield self._question(row, f"test:{number}", text_of(row, "subject"), row[1]["choices"])

    def _question(self, row: Row, place: str, subject: str, choices: list[str]) -> Question:
        text = with_choices(text_of(row, "question"), choices) + "\n" + THINK
        answer, group = letter_of(row, "answer", LETTERS), GROUP_OF.get(subject, "")
        return Question(place, subject, text, answer, LETTERS, english_extraction(LETTERS), group)
