"""Choose from a pool: two trajectories a problem, with weights, for any trainer.

python examples/select_from_a_pool.py [pool.jsonl [student]]     without a pool: the embedded task and student
"""

import sys

import lark

pool = lark.load_pool(sys.argv[1]) if sys.argv[1:] else lark.load_pool(task="arithmetic", limit=40)
scores = lark.score(pool, student=(sys.argv[2:] or ["tiny"])[0])
chosen = lark.select(scores, rule="lark", budget=2)

print(chosen.to_pandas()[["problem_id", "teacher", "correct", "num_tokens", "loss", "score", "weight"]].head())
print("the score goes along with", chosen.record["within_problem_spearman"])
print("written to", chosen.save("selection"))
