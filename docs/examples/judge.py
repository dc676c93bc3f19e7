from my_experts import experts

from moe_harness import check

judged = check(experts, "experts", checks="contract,sentinels", quiet=True)
print(judged.verdict, judged.passed, len(judged.failures))
