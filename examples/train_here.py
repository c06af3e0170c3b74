"""Train a student on the choice, and one on a random choice of as many trajectories; compare them on other problems."""

import lark

pool = lark.load_pool(task="arithmetic", limit=40, held_out=0.1)
scores = lark.score(pool, student="tiny")
chosen = lark.select(scores, rule="lark", budget=2)
control = lark.select(scores, rule="random", like=chosen)

recipe = {"steps": 4, "lr": 3e-4}
trained = lark.train(chosen, **recipe)
print("held-out loss after training:", round(trained.held_out_loss, 4), "nats/token;", trained.checkpoint)
print(lark.compare(chosen, control, pool, evaluation={"samples": 2, "eval_limit": 5}, **recipe))
