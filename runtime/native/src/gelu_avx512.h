/* GELU without a division: max(x, 0) - |x| erfc(|x| / sqrt(2)) / 2, the latter as 16 polynomials of degree 4, whose
 * coefficients are looked up in registers. Largest error 3e-7 for |x| <= 8; above 5.5 it is x or 0 within 1e-7. */

static const float gelu_tail[5][16] = {
    {0.0f, 0.128222808f, 0.16957891f, 0.152808622f, 0.110564619f, 0.0674469844f,
     0.0353968516f, 0.0161405485f, 0.00642915675f, 0.00224403851f, 0.00068767427f,
     0.00018524559f, 4.39017931e-05f, 9.15862165e-06f, 1.68253143e-06f, 2.72273127e-07f},
    {0.177419469f, 0.0810586214f, 0.00669442303f, -0.0345735438f, -0.04573825f, -0.0385606959f,
     -0.0253509264f, -0.0137772579f, -0.00634521572f, -0.00250852783f, -0.000857673353f,
     -0.000254801387f, -6.59827274e-05f, -1.49269208e-05f, -2.95476389e-06f, -5.12404938e-07f},
    {-0.0502331406f, -0.0441962257f, -0.029215645f, -0.0123542557f, 0.000133205627f, 0.00597383594f,
     0.00659579877f, 0.00479006162f, 0.00270694122f, 0.00125623576f, 0.000490638602f,
     0.00016343825f, 4.68153521e-05f, 1.15930952e-05f, 2.49123059e-06f, 4.65816868e-07f},
    {1.12088474e-05f, 0.00380231254f, 0.0056893127f, 0.00512035238f, 0.00305751897f, 0.000945197477f,
     -0.000334829994f, -0.000724391197f, -0.000607107067f, -0.000359857862f, -0.000168488346f,
     -6.49850481e-05f, -2.10846483e-05f, -5.82528992e-06f, -1.38118969e-06f, -2.82548939e-07f},
    {0.00103427342f, 0.000770265236f, 0.000150567139f, -0.000390361442f, -0.000577288156f, -0.000442251825f,
     -0.000197390022f, -1.52463044e-05f, 5.76755629e-05f, 5.85764319e-05f, 3.62361279e-05f,
     1.69140949e-05f, 6.3587795e-06f, 1.98333191e-06f, 5.21713162e-07f, 1.16925513e-07f},
};

TRANSOM_INLINE vector vector_gelu(vector x) {
  /* t = 15.5 at |x| = 5.5. Added to 1.5 * 2^23 it is rounded to a whole number, which stands in the lowest bits. */
  vector most = vector_set(15.49f), whole_at = vector_set(12582912.0f);
  vector t = vector_min(most, vector_mul(vector_abs(x), vector_set(2.8181818f)));
  vector moved = vector_add(t, whole_at);
  vector r = vector_sub(t, vector_sub(moved, whole_at));
  __m512i index = _mm512_castps_si512(moved); /* vpermps looks at the lowest 4 bits */
  vector tail = _mm512_permutexvar_ps(index, vector_load(gelu_tail[4]));
  tail = vector_fma(tail, r, _mm512_permutexvar_ps(index, vector_load(gelu_tail[3])));
  tail = vector_fma(tail, r, _mm512_permutexvar_ps(index, vector_load(gelu_tail[2])));
  tail = vector_fma(tail, r, _mm512_permutexvar_ps(index, vector_load(gelu_tail[1])));
  tail = vector_fma(tail, r, _mm512_permutexvar_ps(index, vector_load(gelu_tail[0])));
  return vector_sub(vector_max(vector_zero(), x), tail);
}
