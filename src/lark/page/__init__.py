"""Write report.html: what runs came to, and the trajectories they chose from, as a page for a browser.

pool_sample   what a run keeps of its pool while that is at hand: texts of a sample of problems, and every rule's choice
contents      what runs left behind, gathered by task, model and pool
plots         the scaffolding of arm_plots, pool_plots and diagnostic_plots; their words are in readings.toml
write         the page: a Jinja2 template, a style sheet and a script, beside it plotly.min.js
"""
