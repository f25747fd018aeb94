"""The knowledge test: the same facts for a seed, asked in words that are never told."""

from mlp_memory.evaluation.facts import RELATIONS, invent


def test_a_seed_gives_the_same_facts_and_another_seed_others():
    assert invent(30, 5) == invent(30, 5)
    assert invent(30, 5) != invent(30, 6)
    first = invent(40, 1)
    second = invent(40, 2, first)
    names = [entity.name for entity in first + second]
    assert len(set(names)) == 80


def test_what_is_asked_is_never_told_and_its_answer_is():
    for entity in invent(10, 3):
        document = entity.document(0)
        assert document == entity.document(0)
        assert document.startswith(entity.name)
        questions = entity.questions()
        assert len(questions) == sum(len(relation.asked) for relation in RELATIONS.values())
        for question in questions:
            assert question.asked not in document
            assert entity.name in question.asked
            assert document.count(f" {question.answers[question.right]}.") >= 3
            assert len(set(question.answers)) == len(question.answers)
