"""bbx and what a user would use instead, measured side by side in one run; never tests. `python -m tests.benchmarks`.

`jobs` names the work, `rivals/` does it with other libraries, `measure` runs whole processes in alternation, `limits`
asks what the machine allows, `numerics` what each option changes, `report` draws the table.
"""
